//! The tile registers of AMX: how a thread gets them and gives them back, and how fast they multiply.
//!
//! The intrinsics are unstable, `asm!` is not. A compiler that knows no tiles keeps none, so every block of assembly loads
//! what it multiplies and stores what it has summed.

#![cfg(target_arch = "x86_64")]

use std::arch::asm;

/// What `ldtilecfg` reads: palette 1, rows and bytes of a row of eight tiles.
#[repr(C, align(64))]
pub(crate) struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl Config {
    /// Tiles of some `(rows, bytes of a row)`, 16 and 64 at most.
    pub const fn new(tiles: [(u8, u16); 8]) -> Config {
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        let mut tile = 0;
        while tile < 8 {
            (rows[tile], row_bytes[tile]) = tiles[tile];
            tile += 1;
        }
        Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes,
            rows,
        }
    }

    /// Configures this thread's tiles; what they held is lost.
    ///
    /// # Safety
    /// AMX can be used (see [`crate::dispatch::Level::Amx`]).
    pub unsafe fn enter(&'static self) {
        // SAFETY: reads 64 bytes of a valid configuration.
        unsafe {
            asm!(
                "ldtilecfg [{config}]", config = in(reg) &raw const *self,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack, preserves_flags, readonly)
            );
        }
    }
}

/// Gives the tiles back, so that context switches need not save them.
///
/// # Safety
/// As [`Config::enter`].
pub(crate) unsafe fn leave() {
    // SAFETY: touches tiles only.
    unsafe {
        asm!(
            "tilerelease",
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, preserves_flags, nomem)
        );
    }
}

/// Whole tiles.
static WHOLE: Config = Config::new([(16, 64); 8]);

macro_rules! spin {
    ($(#[$meta:meta])* $name:ident, $product:literal) => {
        $(#[$meta])*
        ///
        /// # Safety
        /// As [`Config::enter`].
        pub(crate) unsafe fn $name(rounds: usize) {
            // SAFETY: touches tiles only, between `enter` and `leave`.
            unsafe {
                WHOLE.enter();
                asm!(
                    "2:",
                    concat!($product, " tmm0, tmm4, tmm6"), concat!($product, " tmm1, tmm4, tmm7"),
                    concat!($product, " tmm2, tmm5, tmm6"), concat!($product, " tmm3, tmm5, tmm7"),
                    "dec {n}", "jnz 2b",
                    n = inout(reg) rounds.max(1) => _,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, nomem)
                );
                leave();
            }
        }
    };
}

spin!(
    /// `rounds` times four tile products of `bf16` on registers: the ceiling that benchmarks compare with.
    spin_bf16,
    "tdpbf16ps"
);
spin!(
    /// As [`spin_bf16`], of bytes.
    spin_bytes,
    "tdpbsud"
);
