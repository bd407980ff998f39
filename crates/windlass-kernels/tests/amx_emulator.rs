//! The AMX paths of matrix products, packed products and attention, natively where the CPU has AMX, else on an emulator of the eight
//! instructions they use.
//!
//! The emulator is a handler of `SIGILL`: it decodes the VEX instruction that failed, does to memory and to its thread's
//! tile file in software what the manual says, and continues after it.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

use std::cell::UnsafeCell;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use half::bf16;
use windlass_kernels::attention::{
    AttentionShape, KvType, PAGE, PagedKv, Rows, Segment, attention_paged,
};
use windlass_kernels::blocks::BlockType;
use windlass_kernels::dispatch::Level;
use windlass_kernels::gemm::{Epilogue, Layout, Mat, gemm, gemm_kernel_name, reference};
use windlass_kernels::memory::Memory;
use windlass_kernels::packed::{
    Activations, Codes, Layout as Packing, Min, PackedMatrix, Product, RowUnit, Scale,
    kernel_names, multiply,
};
use windlass_kernels::pool::Pool;
use windlass_kernels::{DType, Element, roofline};

/// Eight tiles of 16 rows by 64 bytes, and what `ldtilecfg` said of each: bytes of a row, rows.
struct Tiles {
    words: [[[u32; 16]; 16]; 8],
    shape: [(usize, usize); 8],
    configured: bool,
}

thread_local! {
    static TILES: UnsafeCell<Tiles> = const {
        UnsafeCell::new(Tiles {
            words: [[[0; 16]; 16]; 8],
            shape: [(0, 0); 8],
            configured: false,
        })
    };
}
/// Tile products of `bf16` emulated.
static PRODUCTS: AtomicUsize = AtomicUsize::new(0);
/// Held by a test that counts them.
static COUNTING: Mutex<()> = Mutex::new(());

/// Denormals are zero.
fn flush(x: f32) -> f32 {
    if x.is_subnormal() {
        0f32.copysign(x)
    } else {
        x
    }
}

fn low(word: u32) -> f32 {
    flush(f32::from_bits(word << 16))
}

fn high(word: u32) -> f32 {
    flush(f32::from_bits(word & 0xffff_0000))
}

impl Tiles {
    /// `tdpbf16ps`: even and odd products are summed in two chains, the chains added, then the destination. A product of
    /// two `bf16` is exact in `f32`, so the fused multiply-add is a multiplication and an addition.
    fn product(&mut self, to: usize, a: usize, b: usize) {
        PRODUCTS.fetch_add(1, Ordering::Relaxed);
        let (a_tile, b_tile) = (self.words[a], self.words[b]);
        let ((_, rows), (bytes, _)) = (self.shape[to], self.shape[a]);
        assert!(self.shape[b].1 == bytes / 4, "tile shapes disagree");
        for (to, a_row) in self.words[to].iter_mut().zip(a_tile).take(rows) {
            let mut sums = [[0f32; 2]; 16];
            for (a_word, b_row) in a_row.iter().zip(b_tile).take(bytes / 4) {
                let (x, y) = (low(*a_word), high(*a_word));
                for (sum, word) in sums.iter_mut().zip(b_row) {
                    sum[0] = flush(sum[0] + x * low(word));
                    sum[1] = flush(sum[1] + y * high(word));
                }
            }
            for (word, sum) in to.iter_mut().zip(sums) {
                *word = flush(flush(f32::from_bits(*word)) + flush(sum[0] + sum[1])).to_bits();
            }
        }
    }

    /// `tdpbsud` and `tdpbssd`: signed bytes of A times unsigned or signed ones of B, four a word, without saturation.
    fn byte_product(&mut self, to: usize, a: usize, b: usize, signed: bool) {
        let (a_tile, b_tile) = (self.words[a], self.words[b]);
        let ((_, rows), (bytes, _)) = (self.shape[to], self.shape[a]);
        assert!(self.shape[b].1 == bytes / 4, "tile shapes disagree");
        assert!(
            self.shape[a].1 == rows && self.shape[b].0 == self.shape[to].0,
            "tile shapes disagree"
        );
        let columns = self.shape[to].0 / 4;
        for (to, a_row) in self.words[to].iter_mut().zip(a_tile).take(rows) {
            for (a_word, b_row) in a_row.iter().zip(b_tile).take(bytes / 4) {
                let x = a_word.to_le_bytes().map(|x| i32::from(x as i8));
                for (to, word) in to.iter_mut().zip(b_row).take(columns) {
                    let y = word.to_le_bytes().map(|y| match signed {
                        true => i32::from(y as i8),
                        false => i32::from(y),
                    });
                    let dot: i32 = x.iter().zip(y).map(|(x, y)| x * y).sum();
                    *to = to.wrapping_add(dot as u32);
                }
            }
        }
    }

    unsafe fn configure(&mut self, from: *const u8) {
        // SAFETY: the instruction reads 64 bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from, 64) };
        assert!(bytes[0] == 1 && bytes[1] == 0, "palette 1 from row 0");
        assert!(
            bytes[2..16].iter().all(|&b| b == 0),
            "reserved bytes are zero"
        );
        *self = Tiles {
            words: [[[0; 16]; 16]; 8],
            shape: [(0, 0); 8],
            configured: true,
        };
        for tile in 0..8 {
            let columns = u16::from_le_bytes([bytes[16 + 2 * tile], bytes[17 + 2 * tile]]) as usize;
            self.shape[tile] = (columns, bytes[48 + tile] as usize);
            assert!(
                columns <= 64 && columns.is_multiple_of(4) && self.shape[tile].1 <= 16,
                "a tile is 16 x 64 at most"
            );
        }
    }

    /// `tileloadd` or `tilestored`.
    unsafe fn transfer(&mut self, tile: usize, base: *mut u8, stride: usize, load: bool) {
        let (bytes, rows) = self.shape[tile];
        for (row, words) in self.words[tile].iter_mut().enumerate().take(rows) {
            let memory = base.wrapping_add(row * stride);
            let words = words.as_mut_ptr().cast::<u8>();
            // SAFETY: the instruction accesses this row.
            unsafe {
                if load {
                    words.write_bytes(0, 64);
                    std::ptr::copy_nonoverlapping(memory, words, bytes);
                } else {
                    std::ptr::copy_nonoverlapping(words, memory, bytes);
                }
            }
        }
    }
}

/// Registers by their number in an instruction.
const REGISTERS: [i32; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

/// A three-byte VEX instruction of map 2 with a memory operand decoded.
struct Decoded {
    opcode: u8,
    prefix: u8,
    vvvv: usize,
    /// mod, reg, rm of the ModRM byte.
    modrm: (u8, usize, usize),
    base: usize,
    index: usize,
    length: usize,
}

unsafe fn decode(code: *const u8, register: impl Fn(usize) -> usize) -> Decoded {
    // SAFETY: an instruction is at most 15 bytes, and reading it is what the CPU just did.
    let byte = |at: usize| unsafe { *code.add(at) };
    assert!(
        byte(0) == 0xc4 && byte(1) & 0x1f == 2,
        "not a VEX instruction of map 0F38"
    );
    let extend = |bit: u8, inverted: u8| if inverted >> bit & 1 == 0 { 8 } else { 0 };
    let (opcode, modrm) = (byte(3), byte(4));
    let (mode, reg, rm) = (modrm >> 6, (modrm >> 3 & 7) as usize, (modrm & 7) as usize);
    let vvvv = (!byte(2) >> 3 & 15) as usize;
    let mut decoded = Decoded {
        opcode,
        prefix: byte(2) & 3,
        vvvv,
        modrm: (mode, reg, rm),
        base: 0,
        index: 0,
        length: 5,
    };
    if mode == 3 {
        return decoded;
    }
    let mut base = rm + extend(5, byte(1));
    let mut has_base = true;
    if rm == 4 {
        let sib = byte(5);
        decoded.length += 1;
        base = (sib & 7) as usize + extend(5, byte(1));
        has_base = !(sib & 7 == 5 && mode == 0);
        let index = (sib >> 3 & 7) as usize + extend(6, byte(1));
        if index != 4 {
            decoded.index = register(index) << (sib >> 6);
        }
    }
    assert!(
        rm != 5 || mode != 0,
        "addresses relative to rip are not used"
    );
    let displacement = match mode {
        1 => byte(decoded.length) as i8 as isize,
        2 => i32::from_le_bytes(std::array::from_fn(|i| byte(decoded.length + i))) as isize,
        _ => 0,
    };
    assert!(has_base, "addresses without a base are not used");
    decoded.length += [0, 1, 4][mode as usize];
    decoded.base = register(base).wrapping_add_signed(displacement);
    decoded
}

extern "C" fn on_illegal(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes a ucontext; the tile file is this thread's own.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let tiles = &mut *TILES.with(UnsafeCell::get);
        let rip = registers[libc::REG_RIP as usize] as *const u8;
        let d = decode(rip, |number| registers[REGISTERS[number] as usize] as usize);
        let (mode, reg, rm) = d.modrm;
        match (d.opcode, d.prefix, mode) {
            (0x49, 0, 3) => tiles.configured = false,
            (0x49, 0, _) => tiles.configure(d.base as *const u8),
            (0x49, 3, 3) => tiles.words[reg] = [[0; 16]; 16],
            (0x4b, 3, _) => tiles.transfer(reg, d.base as *mut u8, d.index, true),
            (0x4b, 2, _) => tiles.transfer(reg, d.base as *mut u8, d.index, false),
            (0x5c, 2, 3) => tiles.product(reg, rm, d.vvvv),
            (0x5e, 2, 3) => tiles.byte_product(reg, rm, d.vvvv, false),
            (0x5e, 3, 3) => tiles.byte_product(reg, rm, d.vvvv, true),
            other => panic!("an instruction outside the emulator: {other:x?}"),
        }
        assert!(
            tiles.configured || (d.opcode, d.prefix, mode) == (0x49, 0, 3),
            "tiles used without a configuration"
        );
        registers[libc::REG_RIP as usize] += d.length as i64;
    }
}

/// A pool at the AMX level, emulated where it has to be.
fn amx_pool(threads: usize) -> Option<Pool> {
    if Level::Amx.is_supported() {
        return Some(Pool::with_level(threads, Level::Amx));
    }
    if !Level::Avx512.is_supported() {
        println!("skipped: the AMX path packs with AVX-512, which this CPU lacks");
        return None;
    }
    // SAFETY: the action is valid, and the handler emulates every AMX instruction of the kernels.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = on_illegal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO;
        assert_eq!(
            libc::sigaction(libc::SIGILL, &action, std::ptr::null_mut()),
            0
        );
        Some(Pool::with_level_unchecked(threads, Level::Amx))
    }
}

/// Whole numbers in -3..=3, or fractions.
fn operand(len: usize, seed: usize, whole: bool) -> Vec<bf16> {
    let number = |i: usize| (i + seed).wrapping_mul(2654435761) >> 7;
    let value = |i: usize| {
        if whole {
            (number(i) % 7) as f64 - 3.0
        } else {
            (number(i) % 4001) as f64 / 2000.0 - 1.0
        }
    };
    (0..len).map(|i| bf16::from_f64(value(i))).collect()
}

fn check<C: Element<Acc = f32>>(
    pool: &Pool,
    layout: Layout,
    (m, n, k): (usize, usize, usize),
    whole: bool,
) -> Vec<C> {
    let (a, b) = (operand(m * k, 1, whole), operand(n * k, 2, whole));
    let (bias, residual) = (operand(n, 3, whole), operand(m * n, 4, whole));
    let a = Mat {
        data: &a[..],
        stride: if layout == Layout::Tn { m } else { k },
    };
    let b = Mat {
        data: &b[..],
        stride: if layout == Layout::Nt { k } else { n },
    };
    let residual = Some(Mat {
        data: &residual[..],
        stride: n,
    });
    let epilogue = Epilogue {
        accumulate: m % 2 == 1,
        bias: Some(&bias),
        residual: residual.filter(|_| n % 2 == 0),
    };
    let (mut got, mut want) = (vec![C::from_f64(2.0); m * n], vec![C::from_f64(2.0); m * n]);
    gemm(pool, layout, m, n, k, a, b, &mut got, n, epilogue);
    reference::gemm(layout, (m, n, k), a, b, &mut want, n, epilogue);
    for (i, (g, w)) in got.iter().zip(&want).enumerate() {
        let limit = if whole {
            0.0
        } else {
            (k as f64).sqrt() * 1e-6 * (1.0 + k as f64 / 3.0)
        };
        let error = (g.to_f64() - w.to_f64()).abs();
        assert!(
            error <= limit,
            "{layout:?} {m} x {n} x {k}: element {i} is {g:?}, not {w:?}"
        );
    }
    got
}

#[test]
fn tiles_multiply_as_the_reference() {
    let Some(pool) = amx_pool(1) else { return };
    let _counting = COUNTING.lock().unwrap();
    let before = PRODUCTS.load(Ordering::Relaxed);
    assert_eq!(gemm_kernel_name::<bf16>(&pool), "amx bf16");
    let sizes = [
        (1, 1, 1),
        (1, 33, 65),
        (2, 16, 31),
        (15, 17, 32),
        (16, 32, 64),
        (17, 31, 33),
        (31, 64, 95),
        (32, 32, 2),
        (33, 65, 40),
        (64, 96, 70),
        (97, 40, 34),
        (3, 5, 1027),
        (129, 35, 40),
        (130, 70, 1100),
        (5, 7, 0),
        (140, 20, 0),
    ];
    for size in sizes {
        for layout in [Layout::Nt, Layout::Nn, Layout::Tn] {
            check::<bf16>(&pool, layout, size, true);
            check::<f32>(&pool, layout, size, true);
        }
    }
    // Several packed depths of B.
    check::<f32>(&pool, Layout::Nt, (129, 8, 8200), true);
    // Fractions: near the reference, and the same bits for a row in a tiny, a small and a large batch.
    let n = 40;
    for k in [100, 1500] {
        let all = check::<f32>(&pool, Layout::Nn, (150, n, k), false);
        // Even numbers of rows: the epilogue of `check` depends on their parity.
        for rows in [2, 20] {
            let some = check::<f32>(&pool, Layout::Nn, (rows, n, k), false);
            assert!(
                some.iter()
                    .zip(&all)
                    .all(|(s, a)| s.to_bits() == a.to_bits()),
                "{rows} rows of k = {k}"
            );
        }
    }
    let emulated = PRODUCTS.load(Ordering::Relaxed) - before;
    println!("{emulated} tile products emulated");
    assert!(
        emulated > 1000 || Level::Amx.is_supported(),
        "the tile path did not run"
    );
}

/// Every way to store numbers that a kernel exists for.
fn packings() -> Vec<Packing> {
    let zeros = |codes| Packing {
        codes,
        offset: 0,
        scale: Scale::Half { group: 128 },
        min: Min::Zero,
    };
    let mut all = vec![
        Packing::q4(64),
        Packing::q4(128),
        Packing::q4_asymmetric(128),
        zeros(Codes::U2),
        zeros(Codes::U3),
        zeros(Codes::U8),
    ];
    for packing in BlockType::ALL.iter().filter_map(|&t| Packing::of(t)) {
        if !all.contains(&packing) {
            all.push(packing);
        }
    }
    all
}

/// A number for each place, the same on every machine.
fn noise(i: usize) -> u64 {
    let x = (i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    (x ^ x >> 31).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 20
}

fn noisy_matrix(packing: Packing, pool: &Pool, [n, k]: [usize; 2]) -> PackedMatrix {
    let small = |i| half::f16::from_f64((noise(i) % 2001) as f64 / 1e5 - 0.01).to_bits();
    let bits = packing.codes.bits();
    PackedMatrix::pack(pool, &Memory::new(), packing, [n, k], |row, index, out| {
        let mut unit = RowUnit::ZERO;
        let seed = (row * 64 + index) * 512;
        for (i, code) in unit.codes.iter_mut().enumerate() {
            *code = (noise(seed + i) & ((1 << bits) - 1)) as u8;
        }
        for i in 0..unit.scales.len() {
            unit.scales[i] = match packing.scale {
                Scale::Exponent => 110 + (noise(seed + i) % 20) as u16,
                _ => small(seed + 300 + i),
            };
            unit.mins[i] = match packing.min {
                Min::Zero => (noise(seed + i) & ((1 << bits) - 1)) as u16,
                _ => small(seed + 400 + i),
            };
        }
        for (i, scale) in unit.sub_scales.iter_mut().enumerate() {
            *scale = (noise(seed + i) % 127) as i8 - 63;
            unit.sub_mins[i] = (noise(seed + i + 7) % 64) as u8;
        }
        out.write(&unit);
    })
}

/// A packed product with a bias at the level of a pool.
fn packed_product(pool: &Pool, matrix: &PackedMatrix, x: &[f32]) -> Vec<f32> {
    let x = Activations::quantize(pool, &Memory::new(), x, matrix.cols());
    let bias: Vec<f32> = (0..matrix.rows()).map(|i| i as f32 / 64.0).collect();
    let mut out = vec![0f32; x.rows() * matrix.rows()];
    let product = Product {
        bias: Some(&bias),
        ..Product::of(matrix, &mut out)
    };
    multiply(pool, &x, &mut [product]);
    out
}

#[test]
fn packed_products_on_tiles_have_the_bits_of_the_specification() {
    let Some(pool) = amx_pool(2) else { return };
    if !is_x86_feature_detected!("avx512vnni") {
        println!("skipped: packed products use tiles beside AVX-512 VNNI, which this CPU lacks");
        return;
    }
    let _counting = COUNTING.lock().unwrap();
    let before = PRODUCTS.load(Ordering::Relaxed);
    assert!(kernel_names(Level::Amx).starts_with("AMX tiles"));
    let scalar = Pool::with_level(2, Level::Scalar);
    let mut cases: Vec<(Packing, [usize; 2], usize)> = Vec::new();
    for packing in packings() {
        // Odd numbers of panels, steps, spans and rows.
        cases.extend([
            (packing, [35, 1056], 9),
            (packing, [16, 32], 16),
            (packing, [64, 768], 29),
        ]);
    }
    // Several tasks, of rows and of panels.
    cases.push((Packing::q4(32), [270, 96], 300));
    cases.push((Packing::q8(), [33, 544], 258));
    for (packing, [n, k], m) in cases {
        let matrix = noisy_matrix(packing, &scalar, [n, k]);
        let mut x: Vec<f32> = (0..m * k)
            .map(|i| (noise(i) % 20011) as f32 / 1e4 - 1.0)
            .collect();
        // What is not finite stays in its row.
        x[3 * k + 7] = f32::NAN;
        let want = packed_product(&scalar, &matrix, &x);
        let got = packed_product(&pool, &matrix, &x);
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            assert!(
                got.to_bits() == want.to_bits() || got.is_nan() && i / n == 3,
                "{packing:?}, {m} x {n} x {k}: element {i} is {got}, not {want}"
            );
        }
    }
    let emulated = PRODUCTS.load(Ordering::Relaxed) - before;
    println!("{emulated} tile products emulated");
    assert!(
        emulated > 5_000 || Level::Amx.is_supported(),
        "the tile path did not run"
    );
    assert!(roofline::int8_peak(&pool, 1).is_some_and(|peak| peak > 0.0));
}

/// Vectors multiply for one row what tiles multiply for many.
#[test]
fn attention_on_tiles_has_the_bits_of_vectors() {
    let Some(pool) = amx_pool(2) else { return };
    let _counting = COUNTING.lock().unwrap();
    let before = PRODUCTS.load(Ordering::Relaxed);
    const TOKENS: usize = 90;
    for (heads, kv_heads, head_dim) in [(2, 2, 64), (3, 1, 128), (16, 1, 64)] {
        let shape = AttentionShape {
            heads,
            kv_heads,
            head_dim,
            scale: 0.3,
            softcap: None,
            window: (heads == 16).then_some(70),
        };
        let (width, stride) = (heads * head_dim, kv_heads * head_dim);
        let numbers = |len: usize, seed: usize| -> Vec<f32> {
            let number = |i: usize| (noise(i + seed) % 20011) as f32 / 5e3 - 2.0;
            // Some are so small that products of them would be denormal.
            let small = |i: usize| if i.is_multiple_of(31) { 1e-22 } else { 1.0 };
            (0..len).map(|i| number(i) * small(i)).collect()
        };
        let q = numbers(TOKENS * width, 1);
        let (k, v) = (numbers(TOKENS * stride, 2), numbers(TOKENS * stride, 3));
        for kind in [KvType::Plain(DType::Bf16), KvType::Int8] {
            let mut kv = PagedKv::new(&Memory::new(), kind, kv_heads, head_dim, 2);
            let slots: Vec<u32> = (0..TOKENS as u32).collect();
            kv.write(&pool, Rows::new(&k, stride), Rows::new(&v, stride), &slots);
            const { assert!(TOKENS > PAGE && TOKENS < 2 * PAGE) };
            let run = |from: usize, to: usize| {
                let segment = Segment {
                    q_start: 0,
                    q_len: to - from,
                    kv_start: 0,
                    kv_len: to,
                };
                let (mut out, mut lse) = (
                    vec![0.0; (to - from) * width],
                    vec![0.0; (to - from) * heads],
                );
                let q = Rows::new(&q[from * width..], width);
                attention_paged(
                    &pool,
                    &shape,
                    &[segment],
                    q,
                    &kv,
                    &[0, 1],
                    &mut out,
                    &mut lse,
                );
                out
            };
            let whole = run(0, TOKENS);
            for at in [0, 1, 31, 32, 63, 64, 77, 89] {
                let alone = run(at, at + 1);
                let beside = &whole[at * width..][..width];
                for (i, (a, b)) in alone.iter().zip(beside).enumerate() {
                    assert!(
                        a.to_bits() == b.to_bits() && a.is_finite(),
                        "{shape:?} {kind}: element {i} of {at} is {a}, in a prompt {b}"
                    );
                }
            }
        }
    }
    let emulated = PRODUCTS.load(Ordering::Relaxed) - before;
    println!("{emulated} tile products emulated");
    assert!(
        emulated > 500 || Level::Amx.is_supported(),
        "the tile path did not run"
    );
}
