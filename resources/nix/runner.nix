# The hypervisor's part of a microvm.nix runner: a function with the arguments and the result of the
# files in microvm.nix's lib/runners, so that it could stand there as it is.
#
# The command line is explained in docs/cli.md, the options in docs/microvm.md.
{ pkgs, microvmConfig, macvtapFds, linuxTarget, ... }:

let
  inherit (pkgs) lib;
  inherit (lib) optional optionals concatMap concatMapStringsSep concatStringsSep
    escapeShellArg escapeShellArgs;
  inherit (microvmConfig) hostName vcpu mem interfaces volumes shares socket forwardPorts vsock
    graphics kernel;
  cfg = microvmConfig.drago-vmm;

  program = "${cfg.package}/bin/drago-vmm";

  refusals = import ./refusals.nix {
    inherit lib microvmConfig;
    inherit (pkgs.stdenv.hostPlatform) system;
  };

  # `word,key=value,…`: strings as they are, attributes in the order of their names. Null is left out.
  device = parts: concatStringsSep "," (concatMap (part:
    if builtins.isAttrs part
    then lib.mapAttrsToList (key: value: "${key}=${plain value}")
      (lib.filterAttrs (_: value: value != null) part)
    else optional (part != null) part
  ) parts);
  plain = value: if builtins.isBool value then switch value else toString value;
  switch = on: if on then "on" else "off";

  tapMultiQueue = vcpu > 1;
  # A pair for each processor, as many as drago-vmm has interrupt vectors for.
  queues = optional tapMultiQueue "queues=${toString (lib.min vcpu 64)}";

  # Triple fault for a reboot and reboot at once after a panic: both end the process.
  kernelCommandLine = concatStringsSep " " (
    optionals cfg.serialConsole [ "earlyprintk=ttyS0" "console=ttyS0" ]
    ++ [ "reboot=t" "panic=-1" ]
    ++ map toString microvmConfig.kernelParams
  );

  hostForward = { proto, host, guest, ... }:
    "hostfwd=${proto}:${host.address}:${toString host.port}-:${toString guest.port}";

  # Ports of the host can be had once, so they lead to the first interface that can have them.
  firstUserId = (lib.findFirst ({ type, ... }: type == "user") { id = null; } interfaces).id;

  net = { type, id, mac, tap ? { }, ... }:
    let
      vhost = optional (tap.vhost or false) "vhost=on";
    in
    device ({
      tap = [ "tap=${id}" "mac=${mac}" ] ++ queues ++ vhost;
      macvtap =
        [ "fd=${concatMapStringsSep ":" toString macvtapFds.${id}}" "mac=${mac}" ] ++ vhost;
      user = [ "user" "mac=${mac}" ]
        ++ optionals (id == firstUserId) (map hostForward forwardPorts);
    }.${type});

  listenAddress = { address, port, ... }:
    if lib.hasInfix ":" address && !lib.hasPrefix "[" address
    then "[${address}]:${toString port}"
    else "${address}:${toString port}";

  arguments =
    [
      "--name" hostName
      "--kernel" "${kernel.out}/${linuxTarget}"
      "--initrd" (toString microvmConfig.initrdPath)
      "--cmdline" kernelCommandLine
      "--cpus" (toString vcpu)
      "--memory" (toString mem)
    ]
    ++ optional microvmConfig.hugepageMem "--hugepages"
    ++ optionals (microvmConfig.machineId != null) [ "--uuid" microvmConfig.machineId ]
    ++ [ "--serial" (if cfg.serialConsole then "stdio" else "off") ]
    ++ optionals (socket != null) [ "--control" (toString socket) ]
    ++ optionals (!cfg.sandbox) [ "--sandbox" "off" ]
    # The store comes first: its place, /dev/vda, is known to the guest.
    ++ optionals microvmConfig.storeOnDisk [
      "--disk" (device [ "path=${toString microvmConfig.storeDisk}" "ro=on" ])
    ]
    ++ concatMap ({ image, readOnly, direct, serial, ... }: [
      "--disk"
      (device [
        "path=${toString image}"
        "format=raw"
        (if readOnly then "ro=on" else null)
        (if direct then "direct=on" else null)
        { inherit serial; }
      ])
    ]) volumes
    ++ concatMap ({ tag, socket, ... }: [
      "--fs" (device [ "tag=${tag}" "socket=${toString socket}" ])
    ]) shares
    ++ concatMap (interface: [ "--net" (net interface) ]) interfaces
    # The host's units have given them to vfio-pci.
    ++ concatMap ({ bus, path, ... }:
      optionals (bus == "pci") [ "--vfio" (toString path) ]
    ) microvmConfig.devices
    ++ optionals (vsock.cid != null) [
      "--vsock" (device [ "cid=${toString vsock.cid}" "notify=${switch cfg.notify}" ])
    ]
    ++ optionals microvmConfig.balloon [
      "--balloon"
      (device [
        (if microvmConfig.initialBalloonMem != 0
         then "size=${toString microvmConfig.initialBalloonMem}"
         else null)
        "deflate-on-oom=${switch microvmConfig.deflateOnOOM}"
      ])
    ]
    # Not "${file}", which would copy the secret into the store.
    ++ lib.concatLists (lib.mapAttrsToList (name: file: [
      "--credential" "${name}=${toString file}"
    ]) microvmConfig.credentialFiles)
    ++ optionals graphics.enable (
      let value = device [
        cfg.gpu.renderer
        (lib.optionalAttrs (graphics.vulkan != null) {
          inherit (graphics) vulkan;
          # Not in older versions of microvm.nix; null is left out.
          hostmem = graphics.hostmem or null;
        } // removeAttrs cfg.gpu [ "renderer" ])
      ];
      in [ "--gpu" ] ++ optional (value != "") value
    )
    ++ optionals cfg.guestAgent.enable [
      "--console"
      (device [ "vdagent=${switch (cfg.spice != null)}" "qga=${cfg.guestAgent.socket}" ])
    ]
    ++ optionals (cfg.spice != null) [
      "--spice"
      (device [
        (listenAddress cfg.spice)
        ((cfg.spice.settings or { })
          // { password-file = cfg.spice.passwordFile; inherit (cfg.spice) clients; })
      ])
    ]
    ++ optionals (cfg.vnc != null) [
      "--vnc"
      (device [ (listenAddress cfg.vnc) { password-file = cfg.vnc.passwordFile; } ])
    ]
    ++ optionals ((cfg.sound or null) != null) [ "--sound" (switch cfg.sound) ]
    ++ cfg.extraArgs;

  ctl = "${program} ctl --control ${escapeShellArg (toString socket)}";
in
{
  inherit tapMultiQueue;

  # With a vsock the guest's systemd says when it has booted, else drago-vmm when the guest runs.
  supportsNotifySocket = true;

  command =
    if refusals != [ ]
    then throw (concatStringsSep "\n" ([ "${hostName}:" ] ++ refusals))
    else escapeShellArgs ([ program ] ++ arguments);

  inherit (microvmConfig) preStart;

  requiresMacvtapAsFds = true;

  canShutdown = socket != null;
  shutdownCommand =
    if socket != null
    then ''
      exec ${ctl} shutdown --wait
    ''
    else throw "drago-vmm: cannot be shut down without microvm.socket";

  setBalloonScript =
    if socket != null && microvmConfig.balloon
    then ''
      exec ${ctl} balloon "$SIZE"
    ''
    else null;
}
