//! The table of block types.

use std::fmt;

use super::codebook::is_codebook;

macro_rules! block_types {
    ($($(#[$doc:meta])* $variant:ident $id:literal $elements:literal $bytes:literal;)*) => {
        /// How elements are stored in a GGUF file: plain numbers, or blocks of codes with scales.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[expect(non_camel_case_types, reason = "the names that users see in files and flags")]
        pub enum BlockType {
            $($(#[$doc])* $variant,)*
        }

        impl BlockType {
            /// All of them, by id.
            pub const ALL: &'static [BlockType] = &[$(BlockType::$variant),*];

            /// The number that stands for it in files.
            pub const fn id(self) -> u32 {
                match self { $(BlockType::$variant => $id,)* }
            }

            /// The name that the field uses, as in `Q4_K`.
            pub const fn name(self) -> &'static str {
                match self { $(BlockType::$variant => stringify!($variant),)* }
            }

            /// Elements of one block; 1 for plain numbers.
            pub const fn elements(self) -> usize {
                match self { $(BlockType::$variant => $elements,)* }
            }

            /// Bytes of one block.
            pub const fn bytes(self) -> usize {
                match self { $(BlockType::$variant => $bytes,)* }
            }
        }
    };
}

block_types! {
    /// IEEE single precision.
    F32 0 1 4;
    /// IEEE half precision.
    F16 1 1 2;
    /// 4 bits, symmetric.
    Q4_0 2 32 18;
    /// 4 bits with a minimum.
    Q4_1 3 32 20;
    /// 5 bits, symmetric.
    Q5_0 6 32 22;
    /// 5 bits with a minimum.
    Q5_1 7 32 24;
    /// 8 bits, symmetric.
    Q8_0 8 32 34;
    /// 2 bits with a minimum, 4-bit scales for each 16 elements.
    Q2_K 10 256 84;
    /// 3 bits, symmetric, 6-bit scales for each 16.
    Q3_K 11 256 110;
    /// 4 bits with a minimum, 6-bit scales for each 32.
    Q4_K 12 256 144;
    /// 5 bits with a minimum, 6-bit scales for each 32.
    Q5_K 13 256 176;
    /// 6 bits, symmetric, 8-bit scales for each 16.
    Q6_K 14 256 210;
    /// About 2.1 bits: a codebook of eight elements.
    IQ2_XXS 16 256 66;
    /// About 2.3 bits: a codebook of eight elements.
    IQ2_XS 17 256 74;
    /// About 3.1 bits: a codebook of four elements.
    IQ3_XXS 18 256 98;
    /// About 1.6 bits: a codebook of eight elements.
    IQ1_S 19 256 50;
    /// 4 bits into an uneven table.
    IQ4_NL 20 32 18;
    /// About 3.4 bits: a codebook of four elements.
    IQ3_S 21 256 110;
    /// About 2.6 bits: a codebook of eight elements.
    IQ2_S 22 256 82;
    /// 4 bits into an uneven table, 6-bit scales for each 32.
    IQ4_XS 23 256 136;
    /// Integers of 8 bits.
    I8 24 1 1;
    /// Integers of 16 bits.
    I16 25 1 2;
    /// Integers of 32 bits.
    I32 26 1 4;
    /// Integers of 64 bits.
    I64 27 1 8;
    /// IEEE double precision.
    F64 28 1 8;
    /// About 1.75 bits: a codebook of eight elements.
    IQ1_M 29 256 56;
    /// The upper half of an `f32`.
    BF16 30 1 2;
    /// Ternary, five to a byte.
    TQ1_0 34 256 54;
    /// Ternary, four to a byte.
    TQ2_0 35 256 66;
    /// 4-bit floats with a power of two for each 32 (OCP microscaling).
    MXFP4 39 32 17;
    /// 4-bit floats with an 8-bit float for each 16.
    NVFP4 40 64 36;
    /// One bit: plus or minus a scale.
    Q1_0 41 128 18;
    /// 2 bits: -1, 0, 1 or 2 times a scale.
    Q2_0 42 64 18;
}

/// Ids that files had once, or that live in memory alone.
const REFUSED: [(u32, &str, &str); 10] = [
    (4, "Q4_2", REMOVED),
    (5, "Q4_3", REMOVED),
    (9, "Q8_1", MEMORY_ONLY),
    (15, "Q8_K", MEMORY_ONLY),
    (31, "Q4_0_4_4", REPACKED),
    (32, "Q4_0_4_8", REPACKED),
    (33, "Q4_0_8_8", REPACKED),
    (36, "IQ4_NL_4_4", REPACKED),
    (37, "IQ4_NL_4_8", REPACKED),
    (38, "IQ4_NL_8_8", REPACKED),
];
const REMOVED: &str = "removed from the format in 2023";
const MEMORY_ONLY: &str = "for activations in memory, never for files";
const REPACKED: &str = "an interleaved layout that was removed from the format";

/// An id that stands for no type that files may hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownType {
    /// The id.
    pub id: u32,
}

impl fmt::Display for UnknownType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match REFUSED.iter().find(|(id, ..)| *id == self.id) {
            Some((id, name, why)) => write!(f, "type {id} is {name}, {why}"),
            None => write!(f, "type {} is not known", self.id),
        }
    }
}

impl BlockType {
    /// The type of an id.
    ///
    /// # Errors
    /// What is known of an id that no file may hold.
    pub fn from_id(id: u32) -> Result<Self, UnknownType> {
        let found = Self::ALL.iter().find(|kind| kind.id() == id);
        found.copied().ok_or(UnknownType { id })
    }

    /// The type of a name, in any case: `Q4_K`, `q4_k`.
    pub fn from_name(name: &str) -> Option<Self> {
        let same = |kind: &&BlockType| kind.name().eq_ignore_ascii_case(name);
        Self::ALL.iter().find(same).copied()
    }

    /// Bytes of `elements` consecutive elements; `None` if they fill no whole blocks or the size passes `usize`.
    pub fn size_of(self, elements: usize) -> Option<usize> {
        if !elements.is_multiple_of(self.elements()) {
            return None;
        }
        (elements / self.elements()).checked_mul(self.bytes())
    }

    /// Bits of one element, scales included.
    pub fn bits(self) -> f64 {
        8.0 * self.bytes() as f64 / self.elements() as f64
    }

    /// Whether numbers can be quantized to it: all but codebooks and integers.
    pub fn is_writable(self) -> bool {
        !is_codebook(self) && !self.is_integer()
    }

    /// Whether its elements are integers, which no scale makes numbers of a model.
    pub fn is_integer(self) -> bool {
        use BlockType::{I8, I16, I32, I64};
        matches!(self, I8 | I16 | I32 | I64)
    }
}

impl fmt::Display for BlockType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
