# drago-vmm with drago-gpu beside it, where it is looked for.
#
# Services that run it have an empty PATH, and it is called by any name (argv[0]). So what it needs at
# run time is found by paths into the store: passt by a wrapper, the renderer by drago-gpu's run path,
# libvpx and OpenH264 by drago-vmm's.
{ lib
, rustPlatform
, makeBinaryWrapper
, patchelf
, passt
, virglrenderer
, libvpx
, openh264
, mesa
  # The directory where the host has its own OpenGL drivers, which fit its GPU best.
, driverLink ? "/run/opengl-driver"
}:

let
  root = ../..;
  manifest = lib.importTOML (root + "/Cargo.toml");
  inherit (manifest.workspace) package members;
in

rustPlatform.buildRustPackage {
  pname = "drago-vmm";
  inherit (package) version;

  src = lib.fileset.toSource {
    inherit root;
    fileset = lib.fileset.difference
      (lib.fileset.unions (
        map (path: root + "/${path}") ([ "Cargo.toml" "Cargo.lock" ] ++ members)
      ))
      (lib.fileset.maybeMissing (root + "/tests/fuzz"));
  };
  cargoLock.lockFile = root + "/Cargo.lock";
  cargoBuildFlags = [ "-p" "drago-vmm" "-p" "drago-gpu" ];

  # They want /dev/kvm, network namespaces, QEMU and SPICE clients; `cargo xtask test` runs them.
  doCheck = false;

  nativeBuildInputs = [ makeBinaryWrapper patchelf ];

  # - argv[0] stays what the caller made it: the name of the machine, for `ps`.
  # - Mesa from the store draws in software where the host has no drivers.
  # - drago-gpu gets the environment from drago-vmm.
  postFixup = ''
    patchelf --add-rpath ${lib.makeLibraryPath [ virglrenderer ]} $out/bin/drago-gpu
    patchelf --add-rpath ${lib.makeLibraryPath [ libvpx openh264 ]} $out/bin/drago-vmm
    wrapProgram $out/bin/drago-vmm \
      --inherit-argv0 \
      --suffix PATH : ${lib.makeBinPath [ passt ]} \
      --set-default __EGL_VENDOR_LIBRARY_DIRS \
        ${driverLink}/share/glvnd/egl_vendor.d:${mesa}/share/glvnd/egl_vendor.d \
      --set-default GBM_BACKENDS_PATH ${driverLink}/lib/gbm:${mesa}/lib/gbm \
      --set-default LIBGL_DRIVERS_PATH ${driverLink}/lib/dri:${mesa}/lib/dri \
      --set-default RENDER_SERVER_EXEC_PATH ${virglrenderer}/libexec/virgl_render_server
  '';

  meta = {
    description = "Virtual machine monitor for graphical microVMs with a SPICE server";
    license = with lib.licenses; [ asl20 bsd3 ];
    platforms = [ "x86_64-linux" ];
    mainProgram = "drago-vmm";
  };
}
