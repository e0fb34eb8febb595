# What a configuration asks for and drago-vmm does not do: one sentence each, with what to do instead.
#
# Only values that do not depend on the guest's closure are looked at, because the result becomes
# assertions, which are evaluated before that closure is.
{ lib, system, microvmConfig }:

let
  inherit (lib) optional concatMap filter hasInfix;
  inherit (microvmConfig) interfaces volumes shares devices forwardPorts vsock graphics;
  inherit (microvmConfig.drago-vmm) spice vnc guestAgent;

  userInterfaces = filter ({ type, ... }: type == "user") interfaces;

  # Device options are lists separated by commas, without an escape.
  comma = option: text:
    optional (text != null && hasInfix "," (toString text))
      "${option}: \"${toString text}\" contains a comma, which drago-vmm's options cannot carry";
in

optional (system != "x86_64-linux")
  "drago-vmm runs x86_64-linux only, not ${system}"

++ optional (microvmConfig.cpu != null)
  "microvm.cpu: drago-vmm runs guests on KVM and emulates no processor; leave it null or use qemu"

++ optional (microvmConfig.user != null)
  "microvm.user: drago-vmm does not change its user; the units of the host run it as microvm already"

++ optional (microvmConfig.hotplugMem != 0)
  "microvm.hotplugMem: drago-vmm has no virtio-mem; set microvm.mem to the largest size and microvm.balloon = true, which gives free memory back"

++ optional (microvmConfig.initialBalloonMem != 0 && !microvmConfig.balloon)
  "microvm.initialBalloonMem: needs microvm.balloon = true"

++ optional (vsock.cid != null && vsock.cid < 3)
  "microvm.vsock.cid: ${toString vsock.cid} is reserved; take a number from 3 on that no other machine has"

++ optional (graphics.enable && graphics.vulkan != null && graphics.vulkan != "venus")
  "microvm.graphics.vulkan: drago-vmm has no ${graphics.vulkan}; \"venus\" gives the guest Vulkan, null OpenGL only"

++ optional (spice != null && !graphics.enable)
  "microvm.drago-vmm.spice: needs microvm.graphics.enable = true"

++ optional (vnc != null && !graphics.enable)
  "microvm.drago-vmm.vnc: needs microvm.graphics.enable = true"

++ concatMap ({ type, id, ... }:
  optional (type == "bridge")
    "microvm.interfaces: ${id}: drago-vmm calls no set-user-ID helper to join a bridge; use type = \"tap\" and let systemd-networkd put the tap into the bridge"
) interfaces

++ optional (forwardPorts != [ ] && userInterfaces == [ ])
  "microvm.forwardPorts: needs an interface with type = \"user\""

++ concatMap ({ from, guest, ... }:
  optional (from == "guest")
    "microvm.forwardPorts: from = \"guest\" (port ${toString guest.port}): with drago-vmm the guest reaches the host's own services at 10.0.2.2, at the port they have there"
  ++ optional (from == "host" && !builtins.elem guest.address [ "" "10.0.2.15" ])
    "microvm.forwardPorts: guest.address = \"${guest.address}\": the guest's address is 10.0.2.15; leave it out"
) forwardPorts

++ concatMap ({ image, imageType, serial, ... }:
  optional (imageType != "raw")
    "microvm.volumes: ${image}: imageType = \"${imageType}\": drago-vmm takes raw images and block devices; convert it with qemu-img convert -O raw"
  ++ optional (serial != null && (builtins.match "[!-+.-~-]{1,20}" serial) == null)
    "microvm.volumes: ${image}: serial = \"${serial}\": up to 20 printable ASCII characters without space and comma are possible"
  ++ comma "microvm.volumes" image
) volumes

++ concatMap ({ proto, tag, socket, ... }:
  optional (proto == "9p")
    "microvm.shares: ${tag}: drago-vmm has no 9p; set proto = \"virtiofs\""
  ++ comma "microvm.shares" tag
  ++ comma "microvm.shares: ${tag}" socket
) shares

++ concatMap ({ bus, path, ... }:
  optional (bus == "pci" && microvmConfig.balloon)
    "microvm.devices: ${path}: may use any of the guest's memory at any time, so none of it can be given back; set microvm.balloon = false"
  ++ optional (bus == "usb")
    "microvm.devices: ${path}: drago-vmm passes no USB devices through; pass a whole USB controller through with bus = \"pci\", or use qemu"
) devices

++ concatMap (name:
  optional (builtins.match "[^=/:]+" name == null)
    "microvm.credentialFiles: \"${name}\" is no credential's name: it cannot contain any of = / :"
) (builtins.attrNames microvmConfig.credentialFiles)

++ lib.optionals (spice != null) (comma "microvm.drago-vmm.spice.passwordFile" spice.passwordFile)
++ lib.optionals (vnc != null) (comma "microvm.drago-vmm.vnc.passwordFile" vnc.passwordFile)
++ comma "microvm.drago-vmm.guestAgent.socket" guestAgent.socket
