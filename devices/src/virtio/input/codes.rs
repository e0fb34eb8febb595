//! Event types and codes as in `linux/input-event-codes.h`, as far as a PC has them.

/// Separates groups of events.
pub const EV_SYN: u16 = 0x00;
/// Keys and buttons.
pub const EV_KEY: u16 = 0x01;
/// Relative axes.
pub const EV_REL: u16 = 0x02;
/// Absolute axes.
pub const EV_ABS: u16 = 0x03;
/// Lights.
pub const EV_LED: u16 = 0x11;
/// Repetition of held keys.
pub const EV_REP: u16 = 0x14;

/// Horizontal movement.
pub const REL_X: u16 = 0x00;
/// Vertical movement, positive downwards.
pub const REL_Y: u16 = 0x01;
/// Horizontal wheel, positive to the right.
pub const REL_HWHEEL: u16 = 0x06;
/// Wheel, positive away from the user (up).
pub const REL_WHEEL: u16 = 0x08;

/// Horizontal position.
pub const ABS_X: u16 = 0x00;
/// Vertical position, growing downwards.
pub const ABS_Y: u16 = 0x01;

/// Left mouse button.
pub const BTN_LEFT: u16 = 0x110;
/// Right mouse button.
pub const BTN_RIGHT: u16 = 0x111;
/// Middle mouse button.
pub const BTN_MIDDLE: u16 = 0x112;
/// Side button ("back").
pub const BTN_SIDE: u16 = 0x113;
/// Extra button ("forward").
pub const BTN_EXTRA: u16 = 0x114;

/// Num lock light.
pub const LED_NUML: u16 = 0;
/// Caps lock light.
pub const LED_CAPSL: u16 = 1;
/// Scroll lock light.
pub const LED_SCROLLL: u16 = 2;

/// Escape; the main block of keys follows in the order of their AT scancodes.
pub const KEY_ESC: u16 = 1;
/// The last of the keys whose codes equal their AT scancodes.
pub const KEY_F12: u16 = 88;
/// Right enter.
pub const KEY_KPENTER: u16 = 96;
/// Right control.
pub const KEY_RIGHTCTRL: u16 = 97;
/// Keypad slash.
pub const KEY_KPSLASH: u16 = 98;
/// Print screen.
pub const KEY_SYSRQ: u16 = 99;
/// Right alt, AltGr.
pub const KEY_RIGHTALT: u16 = 100;
/// Home.
pub const KEY_HOME: u16 = 102;
/// Cursor up.
pub const KEY_UP: u16 = 103;
/// Page up.
pub const KEY_PAGEUP: u16 = 104;
/// Cursor left.
pub const KEY_LEFT: u16 = 105;
/// Cursor right.
pub const KEY_RIGHT: u16 = 106;
/// End.
pub const KEY_END: u16 = 107;
/// Cursor down.
pub const KEY_DOWN: u16 = 108;
/// Page down.
pub const KEY_PAGEDOWN: u16 = 109;
/// Insert.
pub const KEY_INSERT: u16 = 110;
/// Delete.
pub const KEY_DELETE: u16 = 111;
/// Mute.
pub const KEY_MUTE: u16 = 113;
/// Volume down.
pub const KEY_VOLUMEDOWN: u16 = 114;
/// Volume up.
pub const KEY_VOLUMEUP: u16 = 115;
/// Power.
pub const KEY_POWER: u16 = 116;
/// Keypad equals.
pub const KEY_KPEQUAL: u16 = 117;
/// Pause, Break.
pub const KEY_PAUSE: u16 = 119;
/// Keypad comma (Brazilian).
pub const KEY_KPCOMMA: u16 = 121;
/// Hangul.
pub const KEY_HANGEUL: u16 = 122;
/// Hanja.
pub const KEY_HANJA: u16 = 123;
/// Yen.
pub const KEY_YEN: u16 = 124;
/// Left logo key.
pub const KEY_LEFTMETA: u16 = 125;
/// Right logo key.
pub const KEY_RIGHTMETA: u16 = 126;
/// Menu.
pub const KEY_COMPOSE: u16 = 127;
/// Browser: stop.
pub const KEY_STOP: u16 = 128;
/// Calculator.
pub const KEY_CALC: u16 = 140;
/// Sleep.
pub const KEY_SLEEP: u16 = 142;
/// Wake up.
pub const KEY_WAKEUP: u16 = 143;
/// Mail.
pub const KEY_MAIL: u16 = 155;
/// Browser: favourites.
pub const KEY_BOOKMARKS: u16 = 156;
/// My computer.
pub const KEY_COMPUTER: u16 = 157;
/// Browser: back.
pub const KEY_BACK: u16 = 158;
/// Browser: forward.
pub const KEY_FORWARD: u16 = 159;
/// Media: next.
pub const KEY_NEXTSONG: u16 = 163;
/// Media: play or pause.
pub const KEY_PLAYPAUSE: u16 = 164;
/// Media: previous.
pub const KEY_PREVIOUSSONG: u16 = 165;
/// Media: stop.
pub const KEY_STOPCD: u16 = 166;
/// Browser: home.
pub const KEY_HOMEPAGE: u16 = 172;
/// Browser: reload.
pub const KEY_REFRESH: u16 = 173;
/// F13; F14 to F24 follow.
pub const KEY_F13: u16 = 183;
/// F24.
pub const KEY_F24: u16 = 194;
/// Search.
pub const KEY_SEARCH: u16 = 217;
/// Media player.
pub const KEY_MEDIA: u16 = 226;

/// The keys of a PC keyboard as inclusive ranges, ascending.
pub const KEYBOARD: &[(u16, u16)] = &[
    // The main block up to the keypad's dot, Zenkaku/Hankaku, the 102nd key, F11, F12, Ro and the
    // Japanese keys, then the grey keys.
    (KEY_ESC, 83),
    (85, 100),
    (KEY_HOME, KEY_DELETE),
    (KEY_MUTE, KEY_PAUSE),
    (KEY_KPCOMMA, KEY_STOP),
    // Again, props, undo, front, copy, open, paste, find, cut, help.
    (129, 138),
    (KEY_CALC, KEY_CALC),
    (KEY_SLEEP, KEY_WAKEUP),
    // WWW, then screen lock.
    (150, 150),
    (152, 152),
    (KEY_MAIL, KEY_FORWARD),
    (161, 161),
    (KEY_NEXTSONG, KEY_STOPCD),
    (KEY_HOMEPAGE, KEY_REFRESH),
    (KEY_F13, KEY_F24),
    (KEY_SEARCH, KEY_SEARCH),
    (KEY_MEDIA, KEY_MEDIA),
];
