/*
 * A guest that shows a still picture on QEMU's VGA adapter and changes a square in it for each key that
 * goes down; in between it halts. The peer of `test-picture --mode key`. Booted by -kernel (Multiboot).
 *
 * Bochs' display interface: docs/specs/standard-vga of QEMU; keyboard, interrupt controllers: PC/AT.
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SQUARE 64

__attribute__((section(".multiboot"), used)) static const u32 header[] = {0x1badb002, 0,
                                                                          -0x1badb002u};

static void outb(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void outw(u16 port, u16 value) { __asm__ volatile("outw %0, %1" ::"a"(value), "Nd"(port)); }
static void outl(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u8 inb(u16 port) {
    u8 value;
    __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}
static u32 inl(u16 port) {
    u32 value;
    __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port));
    return value;
}

static u32 config(u32 slot, u32 offset) {
    outl(0xcf8, 0x80000000u | slot << 11 | offset);
    return inl(0xcfc);
}

static void mode(u16 index, u16 value) {
    outw(0x1ce, index);
    outw(0x1cf, value);
}

static volatile u32 *screen;

static void square(u32 colour) {
    for (u32 y = 0; y < SQUARE; y++)
        for (u32 x = 0; x < SQUARE; x++) screen[(y + 128) * WIDTH + x + 128] = colour;
}

/* Only ends the halt. */
__attribute__((naked)) static void interrupted(void) { __asm__ volatile("iret"); }

static u64 segments[] = {0, 0x00cf9b000000ffffull, 0x00cf93000000ffffull};
static struct {
    u16 low, selector, flags, high;
} gates[0x22];

static void load(const void *table, u16 size, int interrupts) {
    struct __attribute__((packed)) {
        u16 limit;
        u32 base;
    } pointer = {size - 1, (u32)table};
    if (interrupts)
        __asm__ volatile("lidt %0" ::"m"(pointer));
    else
        __asm__ volatile(
            "lgdt %0\n ljmp $8, $1f\n 1: mov $16, %%eax\n mov %%eax, %%ds\n mov %%eax, %%es\n"
            "mov %%eax, %%ss" ::"m"(pointer)
            : "eax");
}

__attribute__((used)) u8 stack[16384];

__attribute__((used)) static void run(void) {
    for (u32 slot = 0; slot < 32; slot++)
        if (config(slot, 8) >> 16 == 0x0300) screen = (u32 *)(config(slot, 0x10) & ~15u);
    mode(4, 0);
    mode(1, WIDTH);
    mode(2, HEIGHT);
    mode(3, 32);
    mode(4, 0x41);
    for (u32 y = 0; y < HEIGHT; y++)
        for (u32 x = 0; x < WIDTH; x++) {
            u32 colour;
            switch ((x / 128 + y / 128) % 4) {
            case 0: colour = (x * 2 & 255) | (y * 2 & 255) << 8 | ((x + y) / 8 & 255) << 16; break;
            case 1: colour = (x ^ y) & 1 ? 0xffffff : 0; break;
            case 2: colour = 40 | (90 + y / 128 % 8 * 16) << 8 | 160 << 16; break;
            default: colour = x / 16 % 2 * 200 | 220 << 8 | y / 16 % 2 * 250 << 16;
            }
            screen[y * WIDTH + x] = colour;
        }
    load(segments, sizeof segments, 0);
    gates[0x21].low = (u16)(u32)interrupted;
    gates[0x21].high = (u16)((u32)interrupted >> 16);
    gates[0x21].selector = 8;
    gates[0x21].flags = 0x8e00;
    load(gates, sizeof gates, 1);
    /* Vectors from 0x20 and 0x28; only the keyboard's line is open. */
    outb(0x20, 0x11), outb(0x21, 0x20), outb(0x21, 4), outb(0x21, 1);
    outb(0xa0, 0x11), outb(0xa1, 0x28), outb(0xa1, 2), outb(0xa1, 1);
    outb(0x21, 0xfd), outb(0xa1, 0xff);
    while (inb(0x64) & 1) inb(0x60);
    for (u32 keys = 0;;) {
        __asm__ volatile("sti; hlt; cli");
        if (!(inb(0x60) & 0x80)) square(++keys & 1 ? 0x00e04020 : 0x002040e0);
        outb(0x20, 0x20);
    }
}

__attribute__((naked)) void _start(void) {
    __asm__ volatile("cli\n lea stack + 16384, %esp\n jmp run");
}
