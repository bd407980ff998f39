//! Which instructions kernels may use, and how one body becomes a function for each.
//!
//! A kernel is written as a safe scalar function (the specification) and, once, as a generic body over
//! `S: Simd, E: SimdElement`. The `kernels!` macro turns the two into a chooser that returns a function pointer for an
//! element type and a [`Level`]; the public function asks for it once, outside its loops, and calls it in its tasks:
//!
//! ```text
//! kernels! {
//!     /// One chunk of `y = a x`.
//!     fn scale_chunk<E>(a: f32, x: &[E], y: &mut [E]) -> () { scalar: scale_scalar, simd: scale_simd }
//! }
//! fn scale_scalar<E: Element>(a: f32, x: &[E], y: &mut [E]) { .. }
//! #[inline(always)]
//! unsafe fn scale_simd<S: Simd, E: SimdElement>(a: f32, x: &[E], y: &mut [E]) { .. }
//!
//! pub fn scale<E: Element>(pool: &Pool, a: f32, x: &[E], y: &mut [E]) {
//!     let chunk = scale_chunk::<E>(pool.level());
//!     let y = SharedMut::new(y);
//!     pool.run(x.len().div_ceil(CHUNK), |task, _| unsafe { chunk(a, .., ..) }) // the pool's level is supported
//! }
//! ```
//!
//! The level comes from the pool ([`crate::pool::Pool::level`]), so tests run every level in one process. `f64` always
//! takes the scalar function. [`Level::Amx`] differs from [`Level::Avx512`] in matrix products only.

use std::sync::OnceLock;

/// A set of instructions, each including the ones before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Level {
    /// The scalar specification.
    Scalar,
    /// AVX2, FMA and F16C: 8 lanes of `f32`.
    Avx2,
    /// AVX-512 F, BW, VL, DQ: 16 lanes of `f32`.
    Avx512,
    /// AMX tiles with products of BF16 and of bytes, on top of AVX-512.
    Amx,
}

impl Level {
    /// All levels, lowest first.
    pub const ALL: [Level; 4] = [Level::Scalar, Level::Avx2, Level::Avx512, Level::Amx];

    /// The level kernels run at: the highest supported one, or what `WINDLASS_KERNELS` says. Decided once.
    ///
    /// # Panics
    /// When [`Level::from_env`] fails; programs call that first and report its message.
    #[track_caller]
    pub fn current() -> Level {
        static CURRENT: OnceLock<Result<Level, String>> = OnceLock::new();
        match CURRENT.get_or_init(Level::from_env) {
            Ok(level) => *level,
            Err(message) => panic!("{message}"),
        }
    }

    /// The level that `WINDLASS_KERNELS` (`scalar`, `avx2`, `avx512` or `amx`) forces, or the highest supported one
    /// when it is unset or empty.
    ///
    /// # Errors
    /// A message when the value is unknown or this CPU does not support the level.
    pub fn from_env() -> Result<Level, String> {
        match std::env::var_os("WINDLASS_KERNELS") {
            Some(value) if !value.is_empty() => Level::parse(&value.to_string_lossy()),
            _ => Ok(*Level::supported()
                .last()
                .expect("scalar is always supported")),
        }
    }

    fn parse(value: &str) -> Result<Level, String> {
        let known = || {
            Level::supported()
                .iter()
                .map(|l| l.name())
                .collect::<Vec<_>>()
                .join(", ")
        };
        let Some(level) = Level::ALL.into_iter().find(|level| level.name() == value) else {
            return Err(format!(
                "WINDLASS_KERNELS={value} is unknown; this CPU supports {}",
                known()
            ));
        };
        if !level.is_supported() {
            return Err(format!(
                "WINDLASS_KERNELS={value} is not supported here; this CPU supports {}",
                known()
            ));
        }
        Ok(level)
    }

    /// The levels this CPU and system can run, lowest first. Never empty.
    pub fn supported() -> &'static [Level] {
        static SUPPORTED: OnceLock<Vec<Level>> = OnceLock::new();
        SUPPORTED.get_or_init(|| {
            Level::ALL
                .into_iter()
                .take_while(|level| detect(*level))
                .collect()
        })
    }

    /// Whether this CPU and system can run the level.
    pub fn is_supported(self) -> bool {
        Level::supported().contains(&self)
    }

    /// The name that `WINDLASS_KERNELS` knows it by.
    pub const fn name(self) -> &'static str {
        match self {
            Level::Scalar => "scalar",
            Level::Avx2 => "avx2",
            Level::Avx512 => "avx512",
            Level::Amx => "amx",
        }
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether the instructions that a level adds to the one below can be executed.
#[cfg(target_arch = "x86_64")]
fn detect(level: Level) -> bool {
    match level {
        Level::Scalar => true,
        Level::Avx2 => {
            is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c")
        }
        Level::Avx512 => {
            is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
        }
        Level::Amx => amx_usable(),
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect(level: Level) -> bool {
    level == Level::Scalar
}

/// AMX needs three consents: the CPU's (leaf 7), the system's (tile state in XCR0) and, on Linux, a permission that
/// the process asks for once, because tile state makes its signal frames larger.
#[cfg(target_arch = "x86_64")]
fn amx_usable() -> bool {
    use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};
    const BF16_TILE_INT8: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    const OSXSAVE: u32 = 1 << 27;

    #[target_feature(enable = "xsave")]
    fn enabled_state() -> u64 {
        // SAFETY: the caller saw OSXSAVE.
        unsafe { _xgetbv(0) }
    }
    let cpu = __cpuid(0).eax >= 7
        && __cpuid_count(7, 0).edx & BF16_TILE_INT8 == BF16_TILE_INT8
        && __cpuid(1).ecx & OSXSAVE != 0;
    // SAFETY: OSXSAVE says that `xgetbv` exists.
    cpu && unsafe { enabled_state() } & TILE_STATE == TILE_STATE && amx_permitted()
}

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
fn amx_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this request takes numbers and touches no memory of ours.
    unsafe {
        libc::syscall(
            libc::SYS_arch_prctl,
            ARCH_REQ_XCOMP_PERM,
            XFEATURE_XTILEDATA,
        ) == 0
    }
}

#[cfg(all(target_arch = "x86_64", not(target_os = "linux")))]
fn amx_permitted() -> bool {
    false
}

/// Makes choosers `fn name<E: Element>(level: Level) -> unsafe fn(..) -> ..` out of a scalar function generic over
/// `E: Element` and a body generic over `S: Simd, E: SimdElement` (see the module's example). Calling the returned
/// function is safe where `level` is supported and the body's own conditions hold.
macro_rules! kernels {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident<$E:ident>($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty
        { scalar: $($scalar:ident)::+, simd: $($simd:ident)::+ })*) => {$(
        $(#[$meta])*
        $vis fn $name<$E: $crate::Element>(level: $crate::dispatch::Level) -> unsafe fn($($ty),*) -> $ret {
            use $crate::DType;
            type Pointer<$E> = unsafe fn($($ty),*) -> $ret;
            #[cfg(target_arch = "x86_64")]
            #[inline(always)]
            fn choose<$E: $crate::simd::SimdElement>(level: $crate::dispatch::Level) -> Pointer<$E> {
                use $crate::{dispatch::Level, simd::{Avx2, Avx512}};
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2<$E: $crate::simd::SimdElement>($($arg: $ty),*) -> $ret {
                    // SAFETY: the features are enabled here; the rest is the caller's promise.
                    unsafe { $($simd)::+::<Avx2, $E>($($arg),*) }
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                unsafe fn avx512<$E: $crate::simd::SimdElement>($($arg: $ty),*) -> $ret {
                    // SAFETY: as above.
                    unsafe { $($simd)::+::<Avx512, $E>($($arg),*) }
                }
                match level {
                    Level::Scalar => $($scalar)::+::<$E>,
                    Level::Avx2 => avx2::<$E>,
                    Level::Avx512 | Level::Amx => avx512::<$E>,
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            fn choose<$E: $crate::Element>(_: $crate::dispatch::Level) -> Pointer<$E> {
                $($scalar)::+::<$E>
            }
            // Neither generic nor inlined: bodies are compiled here once, not again in every crate that calls them.
            #[inline(never)]
            fn f32s(level: $crate::dispatch::Level) -> Pointer<f32> {
                choose::<f32>(level)
            }
            #[inline(never)]
            fn bf16s(level: $crate::dispatch::Level) -> Pointer<half::bf16> {
                choose::<half::bf16>(level)
            }
            #[inline(never)]
            fn f16s(level: $crate::dispatch::Level) -> Pointer<half::f16> {
                choose::<half::f16>(level)
            }
            #[inline(never)]
            fn f64s() -> Pointer<f64> {
                $($scalar)::+::<f64>
            }
            // SAFETY (all): `DTYPE` identifies the sealed type, so source and target are the same type.
            match E::DTYPE {
                DType::F64 => unsafe { std::mem::transmute::<Pointer<f64>, Pointer<$E>>(f64s()) },
                DType::F32 => unsafe { std::mem::transmute::<Pointer<f32>, Pointer<$E>>(f32s(level)) },
                DType::F16 => unsafe { std::mem::transmute::<Pointer<half::f16>, Pointer<$E>>(f16s(level)) },
                DType::Bf16 => unsafe { std::mem::transmute::<Pointer<half::bf16>, Pointer<$E>>(bf16s(level)) },
            }
        }
    )*};
}
pub(crate) use kernels;

/// Makes choosers `fn name(level: Level) -> Option<unsafe fn(..) -> ..>` out of bodies generic over `S: Simd`, for callers
/// that have a scalar form of their own: `None` at the scalar level.
macro_rules! vector_kernels {
    ($($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) -> $ret:ty { $($simd:ident)::+ })*) => {$(
        $(#[$meta])*
        $vis fn $name(level: $crate::dispatch::Level) -> Option<unsafe fn($($ty),*) -> $ret> {
            #[cfg(target_arch = "x86_64")]
            {
                use $crate::{dispatch::Level, simd::{Avx2, Avx512}};
                #[target_feature(enable = "avx2,fma,f16c")]
                unsafe fn avx2($($arg: $ty),*) -> $ret {
                    // SAFETY: the features are enabled here; the rest is the caller's promise.
                    unsafe { $($simd)::+::<Avx2>($($arg),*) }
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq")]
                unsafe fn avx512($($arg: $ty),*) -> $ret {
                    // SAFETY: as above.
                    unsafe { $($simd)::+::<Avx512>($($arg),*) }
                }
                match level {
                    Level::Scalar => None,
                    Level::Avx2 => Some(avx2),
                    Level::Avx512 | Level::Amx => Some(avx512),
                }
            }
            #[cfg(not(target_arch = "x86_64"))]
            {
                let _ = level;
                None
            }
        }
    )*};
}
pub(crate) use vector_kernels;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip_or_explain() {
        for level in Level::ALL {
            match Level::parse(level.name()) {
                Ok(parsed) => assert_eq!(parsed, level),
                Err(message) => {
                    assert!(!level.is_supported());
                    assert!(message.contains("this CPU supports scalar"), "{message}");
                }
            }
        }
        assert!(
            Level::parse("sse9")
                .unwrap_err()
                .contains("WINDLASS_KERNELS=sse9 is unknown")
        );
        assert_eq!(Level::supported()[0], Level::Scalar);
    }
}
