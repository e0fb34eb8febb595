# NixOS module for hosts: import it beside microvm.nix's own `nixosModules.host`.
{ lib, ... }:

{
  # Every machine that is written down in the host's configuration can be a drago-vmm.
  options.microvm.vms = lib.mkOption {
    type = lib.types.attrsOf (lib.types.submodule {
      config.extraModules = [ ./guest.nix ];
    });
  };

  config = {
    # OpenGL drivers for drago-gpu, in /run/opengl-driver.
    hardware.graphics.enable = lib.mkDefault true;

    # For microvm.vsock.cid.
    boot.kernelModules = [ "vhost_vsock" ];
  };
}
