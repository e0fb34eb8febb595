{
  description = "agent-drago: a GNOME desktop in a microVM, seen over SPICE";

  inputs = {
    nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";
    microvm.url = "github:microvm-nix/microvm.nix";
    microvm.inputs.nixpkgs.follows = "nixpkgs";
    drago-vmm.url = "github:OWNER/drago-vmm";
    drago-vmm.inputs.nixpkgs.follows = "nixpkgs";
  };

  outputs = { nixpkgs, microvm, drago-vmm, ... }: {
    nixosConfigurations.host = nixpkgs.lib.nixosSystem {
      system = "x86_64-linux";
      modules = [
        microvm.nixosModules.host
        drago-vmm.nixosModules.host
        {
          # … and the rest of the host.
          microvm.vms.agent-drago.config = import ./agent-drago.nix;

          # Where the guest's network card ends.
          systemd.network.networks."20-agent-drago" = {
            matchConfig.Name = "vm-drago";
            address = [ "10.40.0.1/24" ];
            networkConfig = { DHCPServer = true; IPMasquerade = "ipv4"; };
          };
          networking.useNetworkd = true;

          # Whoever is in the tailnet and has the password.
          networking.firewall.interfaces.tailscale0.allowedTCPPorts = [ 5900 ];
        }
      ];
    };
  };
}
