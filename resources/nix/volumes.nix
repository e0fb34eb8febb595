# Shell text that makes the images of volumes that are not there yet.
{ pkgs, volumes }:

let
  inherit (pkgs) lib;
  inherit (lib) escapeShellArg escapeShellArgs;

  wanted = lib.filter ({ autoCreate, ... }: autoCreate) volumes;

  tools = with pkgs; {
    ext2 = e2fsprogs;
    ext3 = e2fsprogs;
    ext4 = e2fsprogs;
    xfs = xfsprogs;
    btrfs = btrfs-progs;
    vfat = dosfstools;
  };
  tool = { fsType, image, ... }:
    tools.${fsType} or (throw
      "microvm.volumes: ${image}: do not know how to make ${fsType}; set autoCreate = false");

  label = { label, fsType, ... }:
    lib.optionals (label != null) [ (if fsType == "vfat" then "-n" else "-L") label ];

  create = volume@{ image, fsType, mkfsExtraArgs, ... }:
    let
      file = escapeShellArg image;
      part = escapeShellArg "${image}.part";
      extra = lib.optionals (mkfsExtraArgs != null) mkfsExtraArgs;
      size = volume.size or (throw
        "microvm.volumes: ${image}: needs a size, or autoCreate = false");
    in ''
      if [ ! -e ${file} ]; then
        # Under another name until it is complete, so that an interrupted start leaves no half of one.
        rm -f ${part}
        touch ${part}
        # Copy on write, as btrfs does it, makes disk images slow.
        chattr +C ${part} 2>/dev/null || true
        truncate -s ${toString size}M ${part}
        mkfs.${fsType} ${escapeShellArgs (label volume ++ extra)} ${part}
        mv ${part} ${file}
      fi
    '';
in

lib.optionalString (wanted != [ ]) ''
  (
  PATH=${lib.makeBinPath (lib.unique ([ pkgs.coreutils pkgs.e2fsprogs ] ++ map tool wanted))}''${PATH:+:$PATH}
  ${lib.concatMapStrings create wanted})
''
