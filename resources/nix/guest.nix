# NixOS module for guests: import it beside microvm.nix's own `nixosModules.microvm`, then set
# `microvm.hypervisor = "drago-vmm"`. Options: docs/microvm.md.
{ config, lib, options, pkgs, ... }:

let
  inherit (lib) mkDefault mkIf mkMerge mkOption mkOverride types;

  cfg = config.microvm;
  drago = cfg.drago-vmm;
  active = cfg.guest.enable && cfg.hypervisor == "drago-vmm";

  microvmConfig = cfg // {
    inherit (config.networking) hostName;
    hypervisor = "drago-vmm";
    # As defined, not as read; see the option below.
    forwardPorts =
      let option = options.microvm.forwardPorts;
      in if option.isDefined
        then (lib.mergeDefinitions option.loc option.type option.definitionsWithLocations).mergedValue
        else [ ];
  };

  refusals = import ./refusals.nix {
    inherit lib microvmConfig;
    inherit (pkgs.stdenv.hostPlatform) system;
  };

  loopback = address: lib.hasPrefix "127." address || builtins.elem address [ "::1" "[::1]" ];
in
{
  options.microvm = {
    # One value more for the option that microvm.nix declares.
    hypervisor = mkOption { type = types.enum [ "drago-vmm" ]; };

    # microvm.nix asserts that this is empty for everything but qemu. So it reads as empty here, and the
    # runner gets what was defined.
    forwardPorts = mkOption { apply = ports: if active then [ ] else ports; };

    drago-vmm = {
      package = mkOption {
        type = types.package;
        default = cfg.vmHostPackages.drago-vmm or (cfg.vmHostPackages.callPackage ./package.nix { });
        defaultText = lib.literalExpression "config.microvm.vmHostPackages.drago-vmm";
        description = "The drago-vmm package to use.";
      };

      extraArgs = mkOption {
        type = types.listOf types.str;
        default = [ ];
        example = [ "--log" "debug" ];
        description = "More arguments for drago-vmm. An option that is given twice overrides.";
      };

      spice = mkOption {
        default = null;
        example = { address = "100.64.0.6"; port = 5900; passwordFile = "/run/secrets/spice"; };
        description = ''
          Where the guest's screen is served to SPICE clients, such as remote-viewer. Null: nowhere.
        '';
        type = types.nullOr (types.submodule {
          options = {
            address = mkOption {
              type = types.str;
              default = "127.0.0.1";
              description = ''
                IP address of the host to listen on. It need not exist when the machine starts.
              '';
            };
            port = mkOption {
              type = types.port;
              default = 5900;
              description = "TCP port to listen on.";
            };
            passwordFile = mkOption {
              # Not a path: those are copied into the store, where everybody can read them.
              type = types.nullOr types.str;
              default = null;
              example = "/run/secrets/spice";
              description = ''
                File on the host with the password, read when the machine starts. The user microvm
                must be able to read it.
              '';
            };
            clients = mkOption {
              type = types.nullOr (types.enum [ "exclusive" "refuse" "shared" "view-only" ]);
              default = null;
              description = ''
                What happens when a second client comes: it replaces the first one (`exclusive`), is
                refused, shares the screen, or watches (`view-only`). Null: drago-vmm's default.
              '';
            };
            settings = mkOption {
              type = types.attrsOf (types.oneOf [ types.bool types.int types.str ]);
              default = { };
              example = {
                copy-paste = "to-guest";
                file-transfer = false;
                tls-cert-file = "/run/secrets/spice-chain.pem";
                tls-key-file = "/run/secrets/spice-key.pem";
              };
              description = ''
                Further keys of drago-vmm's option `--spice`. Files are named as strings: a path would
                be copied into the store, where everybody can read it.
              '';
            };
          };
        });
      };

      vnc = mkOption {
        default = null;
        example = { port = 5910; passwordFile = "/run/secrets/vnc"; };
        description = ''
          Where the guest's screen is served to VNC clients, beside SPICE or without it. VNC encrypts
          nothing and uses eight characters of the password. Null: nowhere.
        '';
        type = types.nullOr (types.submodule {
          options = {
            address = mkOption {
              type = types.str;
              default = "127.0.0.1";
              description = "IP address of the host to listen on.";
            };
            port = mkOption {
              type = types.port;
              default = 5910;
              description = "TCP port to listen on.";
            };
            passwordFile = mkOption {
              type = types.nullOr types.str;
              default = null;
              example = "/run/secrets/vnc";
              description = "File on the host with the password, read when the machine starts.";
            };
          };
        });
      };

      gpu = mkOption {
        default = { };
        example = { renderer = "virgl"; size = "1920x1080"; };
        description = "Who draws for the guest, and further keys of drago-vmm's option `--gpu`.";
        type = types.submodule {
          freeformType = types.attrsOf (types.oneOf [ types.bool types.int types.str ]);
          options.renderer = mkOption {
            type = types.nullOr (types.enum [ "auto" "virgl" "2d" ]);
            default = null;
            description = ''
              `virgl`: OpenGL, drawn by the host's CPUs if there is no GPU. `2d`: none. Null or `auto`:
              OpenGL where a GPU can draw it.
            '';
          };
        };
      };

      sound = mkOption {
        type = types.nullOr types.bool;
        default = null;
        description = ''
          Whether the guest has a sound card (virtio-snd), which the SPICE clients hear. Null: if its
          screen is served by `spice`.
        '';
      };

      notify = mkOption {
        type = types.bool;
        default = true;
        description = ''
          With `microvm.vsock.cid`: the guest's systemd tells the host when it has booted, and only
          then is the unit microvm@NAME up.
        '';
      };

      guestAgent = {
        enable = mkOption {
          type = types.bool;
          default = false;
          description = "Whether QEMU's guest agent runs in the guest.";
        };
        socket = mkOption {
          type = types.str;
          default = "${config.networking.hostName}-agent.sock";
          defaultText = lib.literalExpression ''"''${config.networking.hostName}-agent.sock"'';
          description = "Socket on the host that leads to the guest agent.";
        };
      };

      serialConsole = mkOption {
        type = types.bool;
        default = true;
        description = "Whether the guest has a serial console, which ends up in the host's journal.";
      };

      sandbox = mkOption {
        type = types.bool;
        default = true;
        description = "Whether drago-vmm confines itself once the machine is built.";
      };
    };
  };

  config = mkMerge [
    {
      microvm.runner.drago-vmm = import ./build-runner.nix {
        inherit pkgs microvmConfig;
        inherit (config.system.build) toplevel;
      };
    }

    (mkIf active {
      assertions = map (message: {
        assertion = false;
        message = "MicroVM ${config.networking.hostName}: ${message}";
      }) refusals;

      warnings = lib.optional
        (drago.spice != null && drago.spice.passwordFile == null && !loopback drago.spice.address)
        ''
          MicroVM ${config.networking.hostName}: whoever reaches ${drago.spice.address} at port ${toString drago.spice.port} can see and use its screen; set microvm.drago-vmm.spice.passwordFile.
        ''
      ++ lib.optional
        (drago.vnc != null && drago.vnc.passwordFile == null && !loopback drago.vnc.address)
        ''
          MicroVM ${config.networking.hostName}: whoever reaches ${drago.vnc.address} at port ${toString drago.vnc.port} can see and use its screen; set microvm.drago-vmm.vnc.passwordFile.
        '';

      # Above microvm.nix's own default, which is false for hypervisors it does not know.
      boot.initrd.systemd.enable = mkOverride 900 true;

      services.qemuGuest.enable = mkDefault drago.guestAgent.enable;
    })

    (mkIf (active && (drago.spice != null || drago.vnc != null)) {
      # Without it microvm.nix keeps the guest's kernel from loading graphics drivers.
      microvm.graphics.enable = mkDefault true;
    })

    (mkIf (active && cfg.graphics.enable) {
      # OpenGL, which finds the virtual GPU by itself.
      hardware.graphics.enable = mkDefault true;
    })

    (mkIf (active && drago.spice != null) {
      # Clipboard, and the screen's size follows the client's window.
      services.spice-vdagentd.enable = mkDefault true;

      # The agent of the user's session. Newer nixpkgs have the same unit in the module above.
      systemd.user.services.spice-vdagent = mkIf config.services.spice-vdagentd.enable {
        description = mkDefault "SPICE agent of the graphical session";
        partOf = mkDefault [ "graphical-session.target" ];
        after = mkDefault [ "graphical-session.target" ];
        wantedBy = mkDefault [ "graphical-session.target" ];
        serviceConfig = {
          ExecStart = mkDefault "${pkgs.spice-vdagent}/bin/spice-vdagent -x";
          Restart = mkDefault "on-failure";
        };
      };
    })
  ];
}
