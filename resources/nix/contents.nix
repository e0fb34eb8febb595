# What is in a runner package, as attributes: scripts (name in bin/ and text), facts (name in
# share/microvm/ and lines), and what the package passes through.
{ pkgs, microvmConfig }:

let
  inherit (pkgs) lib;
  inherit (lib) filter optional optionalAttrs optionalString escapeShellArg;
  inherit (microvmConfig) hostName hypervisor interfaces shares devices vsock vmHostPackages;

  ofType = wanted: filter ({ type, ... }: type == wanted) interfaces;

  # Descriptors from 3 on, one for each pair of queues.
  macvtapQueues = if runner.tapMultiQueue then lib.min microvmConfig.vcpu 64 else 1;
  macvtapFds = builtins.listToAttrs (lib.imap0 (index: { id, ... }: {
    name = id;
    value = builtins.genList (queue: 3 + index * macvtapQueues + queue) macvtapQueues;
  }) (ofType "macvtap"));

  runner = import ./runner.nix {
    inherit pkgs microvmConfig macvtapFds;
    linuxTarget = pkgs.linux.target or pkgs.stdenv.hostPlatform.linux-kernel.target;
  };

  openMacvtapFds = lib.concatMapStrings ({ id, ... }:
    lib.concatMapStrings (fd: ''
      exec ${toString fd}<> "/dev/tap$(< /sys/class/net/${id}/ifindex)"
    '') macvtapFds.${id}
  ) (ofType "macvtap");

  machined = import ./machined.nix { pkgs = vmHostPackages; inherit microvmConfig; };

  scripts = microvmConfig.binScripts // {
    microvm-run = ''
      set -eou pipefail
      ${runner.preStart}
      ${import ./volumes.nix { pkgs = vmHostPackages; inherit (microvmConfig) volumes; }}
      ${optionalString runner.requiresMacvtapAsFds openMacvtapFds}
      runtime_args=${optionalString (microvmConfig.extraArgsScript != null)
        "$(${microvmConfig.extraArgsScript})"}

      # Words of the script above are arguments of their own.
      # shellcheck disable=SC2086
      exec ${optionalString microvmConfig.prettyProcnames
        "-a ${escapeShellArg "microvm@${hostName}"} "}${runner.command} ''${runtime_args:-}
    '';
  } // optionalAttrs runner.canShutdown {
    microvm-shutdown = runner.shutdownCommand;
  } // optionalAttrs (runner.setBalloonScript != null) {
    microvm-balloon = ''
      if [ $# -ne 1 ]; then
        echo "Usage: $0 MIB" >&2
        exit 2
      fi
      SIZE=$1
      ${runner.setBalloonScript}
    '';
  } // optionalAttrs microvmConfig.registerWithMachined {
    microvm-register = machined.register;
    microvm-unregister = machined.unregister;
  };

  # Name below share/microvm: lines.
  facts = {
    hypervisor = [ hypervisor ];
    tap-flags = [ "vnet_hdr" ] ++ optional runner.tapMultiQueue "multi_queue";
    tap-interfaces = map ({ id, ... }: id) (ofType "tap");
    macvtap-interfaces = map ({ id, mac, macvtap, ... }:
      "${id} ${mac} ${macvtap.link} ${macvtap.mode}"
    ) (ofType "macvtap");
    vsock-cid = optional (vsock.cid != null) (toString vsock.cid);
    pci-devices = onBus "pci";
    usb-devices = onBus "usb";
  } // builtins.listToAttrs (lib.concatMap ({ tag, socket, source, ... }: [
    { name = "virtiofs/${tag}/socket"; value = [ socket ]; }
    { name = "virtiofs/${tag}/source"; value = [ source ]; }
  ]) (filter ({ proto, ... }: proto == "virtiofs") shares));
  onBus = wanted: map ({ path, ... }: path) (filter ({ bus, ... }: bus == wanted) devices);
in

{
  inherit scripts facts;
  inherit (runner) command;
  passthru = {
    inherit (runner) canShutdown supportsNotifySocket tapMultiQueue;
    inherit (microvmConfig) hypervisor registerWithMachined machineId;
  };
}
