//! What the driver is told about monitors, and the options that say what there is.

use gpu_protocol::virtio::{Features, kind};

use super::{rig::*, *};
use crate::spec::Spec;

#[test]
fn a_new_monitor_reaches_the_driver() {
    for back_end in ALL {
        println!("{back_end:?}");
        let Some(mut rig) = Rig::new(back_end) else { continue };
        assert_eq!(rig.config(8), 1);
        let info = rig.display_info();
        assert_eq!(info.hdr.kind.get(), kind::OK_DISPLAY_INFO);
        assert_eq!(Rect::from(info.scanouts[0].rect), Rect::of_size(1280, 800));
        assert_eq!(info.scanouts[0].enabled.get(), 1);
        assert_eq!(info.scanouts[1].enabled.get(), 0);

        let mode = DisplayMode { width_mm: 300, height_mm: 200, ..DisplayMode::new(1000, 700) };
        assert!(rig.handle.set_display(0, Some(mode)));
        assert!(!rig.handle.set_display(0, Some(mode)), "nothing changed");
        assert!(!rig.handle.set_display(1, Some(mode)), "there is only one");
        assert!(!rig.handle.set_display(0, Some(DisplayMode::new(0, 5))));
        rig.driver.interrupt.wait_config_change();
        assert_eq!(rig.config(0), 1);
        let info = rig.display_info();
        assert_eq!(Rect::from(info.scanouts[0].rect), Rect::of_size(1000, 700));
        let has_edid = rig.device.features() & Features::EDID.bits() != 0;
        assert!(has_edid || back_end == BackEnd::Qemu);
        if has_edid {
            let edid = rig.edid();
            let width = u32::from(edid[56]) | u32::from(edid[58] >> 4) << 8;
            let height = u32::from(edid[59]) | u32::from(edid[61] >> 4) << 8;
            assert_eq!((width, height), (1000, 700));
            assert_eq!(edid[21..23], [30, 20]);
        }
        rig.device.write_config(4, &1_u32.to_le_bytes());
        assert_eq!(rig.config(0), 0);

        assert!(rig.handle.set_display(0, None));
        assert_eq!(rig.display_info().scanouts[0].enabled.get(), 0);
    }
}

#[test]
fn options_are_understood_and_mistakes_named() {
    let parse = |text: &str| config::parse(Spec::parse("gpu", text).unwrap());
    let shown = |text: &str| format!("{:?}", parse(text).unwrap());
    assert!(shown("").contains("width: 1280, height: 800"));
    assert!(shown("2d,scanouts=2,size=1920x1080").contains("scanouts: 2"));
    assert!(shown("render-node=/dev/dri/renderD129").contains("renderer: Virgl"));
    assert!(shown("socket=/x").contains("/x"));
    assert!(shown("vulkan=venus").contains("vulkan: true, host_memory: Some(268435456)"));
    assert!(shown("vulkan=venus").contains("renderer: Virgl"));
    assert!(shown("vulkan=venus,hostmem=1G").contains("Some(1073741824)"));
    assert!(shown("vulkan=none").contains("vulkan: false, host_memory: None"));
    for (text, message) in [
        ("3d", "--gpu: '3d' is not understood; expected auto, virgl or 2d"),
        ("scanouts=0", "--gpu: scanouts=0: expected 1 to 16"),
        ("size=1920", "--gpu: size=1920: expected WIDTHxHEIGHT, each 1 to 16384"),
        ("size=0x5", "--gpu: size=0x5: expected WIDTHxHEIGHT, each 1 to 16384"),
        ("vulkan=drm", "--gpu: vulkan=drm: expected none or venus"),
        ("2d,vulkan=venus", "--gpu: vulkan=venus: 2d draws nothing but pictures"),
        ("hostmem=1G", "--gpu: hostmem=1G: only vulkan=venus needs such a window"),
        (
            "vulkan=venus,hostmem=300M",
            "--gpu: hostmem=300M: expected a power of two from 1M to 64G, such as 256M",
        ),
        (
            "sockt=x",
            "--gpu: unknown key 'sockt' (known: render-node, vulkan, hostmem, socket, scanouts, size)",
        ),
    ] {
        assert_eq!(parse(text).unwrap_err().to_string(), message);
    }
}
