{
  description = "Graphical microVMs with a SPICE server of their own; a hypervisor for microvm.nix";

  inputs.nixpkgs.url = "github:NixOS/nixpkgs/nixos-unstable";

  outputs = { self, nixpkgs }:
    let
      system = "x86_64-linux";
      pkgs = nixpkgs.legacyPackages.${system};
    in
    {
      packages.${system} = rec {
        drago-vmm = pkgs.callPackage ./resources/nix/package.nix { };
        default = drago-vmm;
      };

      overlays.default = final: _: {
        drago-vmm = final.callPackage ./resources/nix/package.nix { };
      };

      nixosModules = {
        # Beside microvm.nixosModules.microvm, in the guest.
        microvm = ./resources/nix/guest.nix;
        # Beside microvm.nixosModules.host, on the host; brings the above into every microvm.vms.
        host = ./resources/nix/host.nix;
      };

      templates.default = {
        path = ./resources/nix/example;
        description = "A GNOME desktop in a microVM, seen over SPICE";
      };
    };
}
