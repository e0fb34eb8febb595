# Shell text that makes a machine known to systemd-machined, and forgets it.
{ pkgs, microvmConfig }:

let
  inherit (pkgs) lib;
  inherit (microvmConfig) hostName machineId vsock interfaces;

  busctl = "${pkgs.systemd}/bin/busctl";
  manager = "org.freedesktop.machine1 /org/freedesktop/machine1 org.freedesktop.machine1.Manager";

  # Without an ID one is made of the name, so that it stays the same.
  hex =
    if machineId != null
    then lib.replaceStrings [ "-" ] [ "" ] machineId
    else builtins.substring 0 32 (builtins.hashString "sha256" "drago-vmm:${hostName}");

  taps = map ({ id, ... }: id) (lib.filter ({ type, ... }: type == "tap") interfaces);
in
{
  register = ''
    set -euo pipefail
    leader="''${1:-$$}"

    hex=${hex}
    id=()
    for ((i = 0; i < 32; i += 2)); do
      id+=("$((16#''${hex:i:2}))")
    done

    links=()
    taps=(${lib.escapeShellArgs taps})
    for name in "''${taps[@]}"; do
      if [ -r "/sys/class/net/$name/ifindex" ]; then
        links+=("$(< "/sys/class/net/$name/ifindex")")
      fi
    done

    # systemd 259 and later: properties, among them the address for ssh.
    properties=(
      Id ay "''${#id[@]}" "''${id[@]}"
      Service s microvm.nix
      Class s vm
      LeaderPIDFD h @pidfd
      RootDirectory s /
    )
    count=5
    ${lib.optionalString (vsock.cid != null) ''
      properties+=(VSockCID u ${toString vsock.cid} SSHAddress s vsock/${toString vsock.cid})
      count=$((count + 2))
    ''}
    if [ "''${#links[@]}" -gt 0 ]; then
      properties+=(NetworkInterfaces ai "''${#links[@]}" "''${links[@]}")
      count=$((count + 1))
    fi

    methods=$(${busctl} introspect ${manager} 2>/dev/null || true)
    if [[ "$methods" == *RegisterMachineEx* ]]; then
      exec ${pkgs.python3}/bin/python3 -c '
    import os, sys
    leader = os.pidfd_open(int(sys.argv[1]))
    os.set_inheritable(leader, True)
    os.execv(sys.argv[2], [str(leader) if word == "@pidfd" else word for word in sys.argv[2:]])
    ' "$leader" ${busctl} call ${manager} \
        RegisterMachineEx "sa(sv)" ${lib.escapeShellArg hostName} "$count" "''${properties[@]}"
    fi
    exec ${busctl} call ${manager} \
      RegisterMachineWithNetwork sayssusai ${lib.escapeShellArg hostName} \
      "''${#id[@]}" "''${id[@]}" microvm.nix vm "$leader" / "''${#links[@]}" "''${links[@]}"
  '';

  unregister = ''
    # It may be gone already.
    ${busctl} call ${manager} TerminateMachine s ${lib.escapeShellArg hostName} 2>/dev/null || true
  '';
}
