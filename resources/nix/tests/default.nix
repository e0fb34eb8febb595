# Everything tests/tests/nix.rs compares with the files in expected/, as JSON, by
# nix-instantiate --store dummy:// --eval --strict --json --argstr package /nix/store/drago-vmm
#
# With --argstr machines JSON also the runners of these configurations, for the tests that start them.
{ package, machines ? "{}" }:

let
  cases = import ./cases.nix { inherit package; };
  stub = system: import ./stub.nix { inherit package system; };
  pkgs = stub "x86_64-linux";
  inherit (pkgs) lib;

  # Attributes of attributes, as far down as both sides have them.
  merge = below: above:
    below // builtins.mapAttrs (name: value:
      if builtins.isAttrs value && builtins.isAttrs (below.${name} or null) && name != "spice"
      then merge below.${name} value
      else value
    ) above;
  configure = own: merge (cases.defaults // { vmHostPackages = pkgs; }) own;

  accept = own:
    let
      microvmConfig = configure own;
      contents = import ../contents.nix { inherit pkgs microvmConfig; };
      build = import ../build-runner.nix { inherit pkgs microvmConfig; toplevel = "/nix/store/toplevel"; };
    in {
      inherit (contents) command scripts;
      inherit (build) passthru script;
    };

  refusals = system: own: import ../refusals.nix {
    inherit lib system;
    microvmConfig = configure own;
  };

  # The guest's module, with this configuration as what NixOS would have made of it.
  module = own:
    let
      microvm = configure own;
      guest = import ../guest.nix {
        inherit lib pkgs;
        config = {
          inherit microvm;
          networking.hostName = microvm.hostName;
          services.spice-vdagentd.enable = true;
        };
        options.microvm.forwardPorts = {
          isDefined = microvm.forwardPorts != [ ];
          loc = [ ];
          type = null;
          definitionsWithLocations = [ { value = microvm.forwardPorts; } ];
        };
      };
      all = attribute:
        lib.concatMap (part: lib.optional (part ? ${attribute}) part.${attribute}) guest.config;
    in {
      # What microvm.nix reads.
      forwardPorts = builtins.length (guest.options.microvm.forwardPorts.apply microvm.forwardPorts);
      assertions = map ({ message, ... }: message) (lib.concatLists (all "assertions"));
      warnings = lib.concatLists (all "warnings");
      boot = all "boot";
      hardware = all "hardware";
      services = all "services";
      systemd = all "systemd";
    };
in
{
  accepted = builtins.mapAttrs (_: accept) (cases.accepted // { inherit (cases) example; });
  machines = builtins.mapAttrs (_: accept) (builtins.fromJSON machines);
  refused = builtins.mapAttrs (_: refusals "x86_64-linux") cases.refused // {
    system = refusals "aarch64-linux" { };
  };
  throws = builtins.mapAttrs (_: own:
    !(builtins.tryEval (accept own).command).success
  ) cases.refused;
  modules = {
    plain = module { };
    spice = module cases.accepted.spice;
    open = module (cases.accepted.spice-ipv6 // {
      drago-vmm.spice = { address = "192.0.2.1"; port = 5900; passwordFile = null; clients = null; };
    });
    forward = module cases.accepted.user;
    refused = module cases.refused.forward-without-user;
    other = module (cases.refused.forward-without-user // { hypervisor = "qemu"; });
  };
}
