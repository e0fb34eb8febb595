/*
 * A guest that does nothing but tell QEMU's ramfb where its frame buffer is, and halt. The bench
 * paints into that memory from outside, so QEMU shows the same frames as our server and spends no
 * time on running a guest. Booted by -kernel (Multiboot).
 *
 * fw_cfg: docs/specs/fw_cfg of QEMU; ramfb: struct RAMFBCfg in hw/display/ramfb.c, big-endian.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef WIDTH
#define WIDTH 1280
#define HEIGHT 720
#endif
#define FRAME_BUFFER 0x2000000u

__attribute__((section(".multiboot"), used)) static const u32 header[] = {0x1badb002, 0,
                                                                          -0x1badb002u};

static void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u8 inb(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u32 read_be(int bytes) {
    u32 value = 0;
    while (bytes--) value = value << 8 | inb(0x511);
    return value;
}

static struct __attribute__((packed)) {
    u64 address;
    u32 fourcc, flags, width, height, stride;
} config;
static volatile struct __attribute__((packed)) {
    u32 control, length;
    u64 address;
} dma;

void _start(void) {
    outw(0x510, 0x19);
    u32 count = read_be(4), key = 0;
    for (u32 i = 0; i < count; i++) {
        read_be(4);
        u32 select = read_be(2);
        read_be(2);
        const char *wanted = "etc/ramfb";
        int equal = 1;
        for (int at = 0; at < 56; at++) {
            char c = (char)inb(0x511);
            if (at < 10 && c != wanted[at]) equal = 0;
        }
        if (equal) key = select;
    }
    config.address = __builtin_bswap64(FRAME_BUFFER);
    config.fourcc = __builtin_bswap32(0x34325258); /* XR24 */
    config.flags = 0;
    config.width = __builtin_bswap32(WIDTH);
    config.height = __builtin_bswap32(HEIGHT);
    config.stride = __builtin_bswap32(WIDTH * 4);
    /* Select and write. */
    dma.control = __builtin_bswap32(key << 16 | 8 | 16);
    dma.length = __builtin_bswap32(sizeof config);
    dma.address = __builtin_bswap64((u32)&config);
    outl(0x514, 0);
    outl(0x518, __builtin_bswap32((u32)&dma));
    for (;;) __asm__ volatile("cli; hlt");
}
