# What the cases have in common (microvm.nix's defaults), and what each has of its own.
{ package }:

let
  volume = {
    serial = null;
    direct = false;
    readOnly = false;
    label = null;
    mountPoint = null;
    size = 64;
    autoCreate = true;
    mkfsExtraArgs = [ ];
    fsType = "ext4";
    imageType = "raw";
  };
  share = { tag, ... }@own: {
    proto = "virtiofs";
    socket = "guest-virtiofs-${tag}.sock";
    source = "/srv/${tag}";
    readOnly = false;
  } // own;
  interface = own: { bridge = null; tap.vhost = false; } // own;
  spice = { address = "127.0.0.1"; port = 5900; passwordFile = null; clients = null; };
  forward = { host, guest, ... }@own: {
    from = "host";
    proto = "tcp";
  } // own // {
    host = { address = ""; } // host;
    guest = { address = ""; } // guest;
  };

  tap = interface { type = "tap"; id = "vm-guest"; mac = "02:00:00:00:00:01"; };
  user = interface { type = "user"; id = "net0"; mac = "02:00:00:00:00:02"; };
in
{
  # The example, with the defaults that NixOS would fill in.
  example =
    let inherit (import ../example/agent-drago.nix { pkgs = { }; }) microvm; in
    microvm // {
      storeOnDisk = false;
      graphics.enable = true;
      volumes = map (own: volume // own) microvm.volumes;
      shares = map share microvm.shares;
      interfaces = map interface microvm.interfaces;
      drago-vmm = microvm.drago-vmm // { spice = spice // microvm.drago-vmm.spice; };
    };

  defaults = {
    hypervisor = "drago-vmm";
    hostName = "guest";
    guest.enable = true;
    cpu = null;
    user = null;
    vcpu = 1;
    mem = 512;
    hugepageMem = false;
    hotplugMem = 0;
    hotpluggedMem = 0;
    balloon = false;
    initialBalloonMem = 0;
    deflateOnOOM = true;
    forwardPorts = [ ];
    volumes = [ ];
    interfaces = [ ];
    shares = [ ];
    devices = [ ];
    vsock.cid = null;
    socket = "guest.sock";
    machineId = "a67472e5-570e-5c8a-b18c-ae3c77701050";
    registerWithMachined = false;
    kernel.out = "/nix/store/linux";
    initrdPath = "/nix/store/initrd/initrd";
    kernelParams = [ "loglevel=4" "init=/nix/store/toplevel/init" ];
    storeOnDisk = true;
    storeDisk = "/nix/store/microvm-store-disk.erofs";
    systemSymlink = false;
    graphics = { enable = false; vulkan = null; hostmem = "256M"; };
    credentialFiles = { };
    preStart = "";
    extraArgsScript = null;
    prettyProcnames = true;
    binScripts = { };
    drago-vmm = {
      inherit package;
      extraArgs = [ ];
      spice = null;
      vnc = null;
      gpu.renderer = null;
      notify = true;
      guestAgent = { enable = false; socket = "guest-agent.sock"; };
      serialConsole = true;
      sandbox = true;
    };
  };

  accepted = {
    plain = { };

    spice = {
      graphics.enable = true;
      drago-vmm.spice = spice // {
        address = "100.64.0.6";
        passwordFile = "/run/secrets/spice";
        clients = "shared";
        settings = { copy-paste = "to-guest"; file-transfer = false; };
      };
      drago-vmm.gpu = { renderer = "2d"; size = "1920x1080"; scanouts = 2; };
      drago-vmm.guestAgent.enable = true;
    };

    # A display for screenshots, an IPv6 address for viewers.
    graphics = { graphics.enable = true; };
    vulkan = { graphics = { enable = true; vulkan = "venus"; hostmem = "1G"; }; };
    vulkan-own = { graphics = { enable = true; vulkan = "venus"; }; drago-vmm.gpu.hostmem = "512M"; };
    spice-ipv6 = {
      graphics.enable = true;
      drago-vmm.spice = spice // { address = "::1"; port = 5901; };
    };

    vnc = {
      graphics.enable = true;
      drago-vmm.vnc = { address = "::1"; port = 5910; passwordFile = "/run/secrets/vnc"; };
    };

    volumes = {
      volumes = [
        (volume // { image = "var.img"; label = "var"; serial = "var-1"; })
        (volume // { image = "my data.img"; direct = true; fsType = "ext2"; mkfsExtraArgs = [ "-m" "0" ]; })
        (volume // { image = "/dev/vg/ro"; readOnly = true; autoCreate = false; })
      ];
      # The working directory is that of the machine; so is a script's.
      extraArgsScript = "./more-arguments";
      preStart = "touch started";
    };

    virtiofs = {
      storeOnDisk = false;
      systemSymlink = true;
      shares = [
        (share { tag = "ro-store"; source = "/nix/store"; })
        # All but the tag and the socket is virtiofsd's.
        (share {
          tag = "home";
          readOnly = true;
          cache = "never";
          posixAcl = false;
          extraArgs = [ "--translate-uid" "map:0:1000:1" ];
          securityModel = "mapped";
        })
      ];
      virtiofsd = { threadPoolSize = "`nproc`"; extraArgs = [ "--xattr" ]; };
      hugepageMem = true;
    };

    tap = { interfaces = [ tap ]; };
    tap-queues = {
      vcpu = 4;
      interfaces = [ (tap // { tap.vhost = true; }) ];
      registerWithMachined = true;
    };
    tap-many = { vcpu = 100; interfaces = [ tap ]; };
    macvtap = {
      vcpu = 2;
      interfaces = [
        (interface {
          type = "macvtap";
          id = "vm-a";
          tap.vhost = true;
          mac = "02:00:00:00:00:03";
          macvtap = { link = "eno1"; mode = "bridge"; };
        })
        tap
        (interface {
          type = "macvtap";
          id = "vm-b";
          mac = "02:00:00:00:00:04";
          macvtap = { link = "eno1"; mode = "private"; };
        })
      ];
    };
    user = {
      interfaces = [ user (user // { id = "net1"; mac = "02:00:00:00:00:05"; }) ];
      forwardPorts = [
        (forward { host.port = 2222; guest.port = 22; })
        (forward {
          proto = "udp";
          host = { address = "127.0.0.1"; port = 5353; };
          guest = { address = "10.0.2.15"; port = 53; };
        })
      ];
    };

    vsock = { vsock.cid = 42; registerWithMachined = true; machineId = null; };
    vsock-quiet = { vsock.cid = 42; drago-vmm.notify = false; };
    balloon = { balloon = true; };
    balloon-size = { balloon = true; initialBalloonMem = 128; deflateOnOOM = false; };
    credentials = {
      credentialFiles = {
        SOPS_AGE_KEY = "/run/secrets/age key";
        "ssh.ephemeral-authorized_keys-all" = "/run/secrets/keys";
      };
    };

    passthrough = {
      devices = [
        { bus = "pci"; path = "0000:01:00.0"; }
        { bus = "pci"; path = "0000:01:00.1"; }
      ];
    };

    # What is the guest's, or another hypervisor's: nothing comes of it.
    indifferent = {
      storeDiskType = "squashfs";
      writableStoreOverlay = "/nix/.rw-store";
      registerClosure = false;
      graphics = { backend = "gtk"; socket = "guest-gpu.sock"; crosvmPackage = "/nix/store/crosvm"; };
      qemu = {
        machine = "q35";
        machineOpts.accel = "tcg";
        serialConsole = false;
        pcieRootPorts = [ { id = "port"; bus = "pcie.0"; chassis = 0; slot = null; addr = null; } ];
        extraArgs = [ "-s" ];
      };
      vsock.ssh.enable = true;
    };

    # No control socket, no console, no name for ps, no sandbox.
    bare = {
      socket = null;
      prettyProcnames = false;
      machineId = null;
      drago-vmm.serialConsole = false;
      drago-vmm.sandbox = false;
      drago-vmm.extraArgs = [ "--log" "info,devices=debug" ];
    };
  };

  refused = {
    cpu = { cpu = "cortex-a53"; };
    user-change = { user = "nobody"; };
    virtio-mem = { hotplugMem = 1024; };
    balloon-without = { initialBalloonMem = 128; };
    vsock-reserved = { vsock.cid = 2; };
    vulkan = { graphics = { enable = true; vulkan = "drm_native_context"; }; };
    spice-without-graphics = { drago-vmm.spice = spice; };
    vnc-without-graphics = {
      drago-vmm.vnc = { address = "127.0.0.1"; port = 5910; passwordFile = null; };
    };
    bridge = { interfaces = [ (interface { type = "bridge"; id = "vm-br"; mac = "02:00:00:00:00:06"; bridge = "br0"; }) ]; };
    forward-without-user = {
      interfaces = [ tap ];
      forwardPorts = [ (forward { host.port = 2222; guest.port = 22; }) ];
    };
    forward-to-host = {
      interfaces = [ user ];
      forwardPorts = [
        (forward { from = "guest"; host.port = 80; guest = { address = "10.0.2.10"; port = 80; }; })
        (forward { host.port = 81; guest = { address = "10.0.2.10"; port = 80; }; })
      ];
    };
    volumes = {
      volumes = [
        (volume // { image = "a.qcow2"; imageType = "qcow2"; })
        (volume // { image = "b.img"; serial = "twenty-one-characters"; })
        (volume // { image = "c,d.img"; })
      ];
    };
    shares = { shares = [ (share { tag = "home"; proto = "9p"; socket = null; }) ]; };
    devices = {
      balloon = true;
      devices = [
        { bus = "pci"; path = "0000:01:00.0"; }
        { bus = "usb"; path = "vendorid=0xabcd,productid=0x0123"; }
      ];
    };
    credential-name = { credentialFiles."a/b" = "/run/secrets/a"; };
    password-comma = {
      graphics.enable = true;
      drago-vmm.spice = spice // { passwordFile = "/run/a,b"; };
    };
  };
}
