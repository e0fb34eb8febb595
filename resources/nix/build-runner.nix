# The runner package that microvm.nix's host module and its `microvm` command work with: scripts in
# bin/, facts about the machine in share/microvm/, and a few of them as attributes.
#
# microvm.nix builds these only for the hypervisors in its own tree.
{ pkgs, microvmConfig, toplevel }:

let
  inherit (pkgs) lib;
  inherit (lib) optional optionalString escapeShellArg;
  inherit (microvmConfig) hostName hypervisor vmHostPackages;

  contents = import ./contents.nix { inherit pkgs microvmConfig; };

  linkScript = name: text: ''
    ln -s ${vmHostPackages.writeShellScript "microvm-${hostName}-${name}" text} "$out"/bin/${name}
  '';
  writeFact = name: lines: optionalString (lines != [ ]) ''
    mkdir -p "$out"/share/microvm/${escapeShellArg (dirOf name)}
    printf '%s\n' ${lib.escapeShellArgs lines} > "$out"/share/microvm/${escapeShellArg name}
  '';
in

vmHostPackages.buildPackages.runCommand "microvm-${hypervisor}-${hostName}" {
  # For `nix run`.
  meta.mainProgram = "microvm-run";
  inherit (contents) passthru;
} (lib.concatStrings (
  [ ''
    mkdir -p "$out"/bin "$out"/share/microvm
  '' ]
  ++ lib.mapAttrsToList linkScript contents.scripts
  ++ lib.mapAttrsToList writeFact contents.facts
  ++ optional microvmConfig.systemSymlink ''
    ln -s ${toplevel} "$out"/share/microvm/system
  ''
))
