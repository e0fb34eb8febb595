# As much of nixpkgs as the files under test use, for evaluation without a network: packages are names of
# places in the store, and the helpers are those with the same names in nixpkgs' lib.
{ package, system }:

let
  inherit (builtins) concatLists concatMap concatStringsSep filter genList head length map match
    replaceStrings stringLength substring toString;

  lib = rec {
    inherit concatLists concatMap concatStringsSep filter replaceStrings;

    min = a: b: if a < b then a else b;
    optional = on: value: if on then [ value ] else [ ];
    optionals = on: values: if on then values else [ ];
    optionalString = on: text: if on then text else "";
    optionalAttrs = on: attrs: if on then attrs else { };

    concatStrings = concatStringsSep "";
    concatMapStrings = f: list: concatStrings (map f list);
    concatMapStringsSep = separator: f: list: concatStringsSep separator (map f list);
    hasPrefix = prefix: text: substring 0 (stringLength prefix) text == prefix;
    hasInfix = infix: text: replaceStrings [ infix ] [ "" ] text != text;
    escapeShellArg = value:
      if match "[a-zA-Z0-9,._+:@%/-]+" (toString value) != null
      then toString value
      else "'${replaceStrings [ "'" ] [ "'\\''" ] (toString value)}'";
    escapeShellArgs = concatMapStringsSep " " escapeShellArg;
    makeBinPath = concatMapStringsSep ":" (place: "${place}/bin");

    unique = builtins.foldl' (seen: value: if builtins.elem value seen then seen else seen ++ [ value ]) [ ];
    imap0 = f: list: genList (index: f index (builtins.elemAt list index)) (length list);
    findFirst = wanted: default: list:
      let found = filter wanted list; in if found == [ ] then default else head found;
    mapAttrsToList = f: attrs: map (name: f name attrs.${name}) (builtins.attrNames attrs);
    filterAttrs = wanted: attrs:
      removeAttrs attrs (filter (name: !wanted name attrs.${name}) (builtins.attrNames attrs));

    # The module system: no types, no priorities, conditions at once.
    mkOption = declaration: declaration;
    mkDefault = value: value;
    mkOverride = _: value: value;
    mkIf = on: value: if on then value else { };
    mkMerge = parts: parts;
    literalExpression = text: text;
    mergeDefinitions = _: _: definitions: { mergedValue = concatMap ({ value, ... }: value) definitions; };
    types = {
      bool = null;
      int = null;
      str = null;
      port = null;
      package = null;
      enum = _: null;
      nullOr = _: null;
      listOf = _: null;
      attrsOf = _: null;
      oneOf = _: null;
      submodule = _: null;
    };
  };

  pkgs = builtins.listToAttrs (map (name: { inherit name; value = "/nix/store/${name}"; }) [
    "btrfs-progs"
    "coreutils"
    "dosfstools"
    "e2fsprogs"
    "python3"
    "spice-vdagent"
    "systemd"
    "xfsprogs"
  ]) // {
    inherit lib;
    drago-vmm = package;
    stdenv.hostPlatform = { inherit system; linux-kernel.target = "bzImage"; };
    buildPackages = pkgs;
    runCommand = name: attrs: script: attrs // { inherit name script; };
    writeShellScript = name: _: "/nix/store/${name}";
  };
in
pkgs
