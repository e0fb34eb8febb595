{ pkgs, ... }:

{
  microvm = {
    hypervisor = "drago-vmm";
    vcpu = 4;
    mem = 4096;

    # remote-viewer spice://100.64.0.6:5900
    drago-vmm.spice = {
      address = "100.64.0.6";
      port = 5900;
      passwordFile = "/run/secrets/agent-drago-spice";
    };

    # "The machine has booted" for systemd, and `ssh vsock/6`.
    vsock.cid = 6;
    vsock.ssh.enable = true;

    interfaces = [ {
      type = "tap";
      id = "vm-drago";
      mac = "02:00:00:00:00:06";
      tap.vhost = true;
    } ];

    shares = [ {
      proto = "virtiofs";
      tag = "ro-store";
      source = "/nix/store";
      mountPoint = "/nix/.ro-store";
    } ];

    volumes = [ {
      image = "home.img";
      label = "home";
      mountPoint = "/home";
      size = 20480;
    } ];

    balloon = true;
  };

  services.desktopManager.gnome.enable = true;
  services.displayManager = {
    gdm.enable = true;
    autoLogin = { enable = true; user = "agent"; };
  };

  users.users.agent = {
    isNormalUser = true;
    extraGroups = [ "wheel" ];
    # Change it: mkpasswd.
    initialPassword = "agent";
    openssh.authorizedKeys.keys = [ ];
  };

  environment.systemPackages = [ pkgs.firefox ];

  system.stateVersion = "26.05";
}
