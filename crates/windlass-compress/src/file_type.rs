//! What a whole file is quantized to: a block type for most tensors, and which exceptions are made.

use std::fmt;

use windlass_tensor::kernels::blocks::BlockType;

macro_rules! file_types {
    ($($(#[$doc:meta])* $variant:ident $id:literal $base:ident;)*) => {
        /// A mix of block types, by the name and number that llama.cpp gave it.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[expect(non_camel_case_types, reason = "the names that users see in files and flags")]
        pub enum FileType {
            $($(#[$doc])* $variant,)*
        }

        impl FileType {
            /// All of them.
            pub const ALL: &'static [FileType] = &[$(FileType::$variant),*];

            /// The value of `general.file_type`.
            pub const fn id(self) -> u32 {
                match self { $(FileType::$variant => $id,)* }
            }

            /// The name, as in `Q4_K_M`.
            pub const fn name(self) -> &'static str {
                match self { $(FileType::$variant => stringify!($variant),)* }
            }

            /// The type of most tensors.
            pub const fn base(self) -> BlockType {
                match self { $(FileType::$variant => BlockType::$base,)* }
            }
        }
    };
}

file_types! {
    /// Single precision.
    F32 0 F32;
    /// Half precision.
    F16 1 F16;
    /// The upper half of single precision.
    BF16 32 BF16;
    /// 8 bits.
    Q8_0 7 Q8_0;
    /// 6 bits.
    Q6_K 18 Q6_K;
    /// 5 bits, with 6 in half of the values and down projections.
    Q5_K_M 17 Q5_K;
    /// 5 bits.
    Q5_K_S 16 Q5_K;
    /// 5 bits with minimums, the older kind.
    Q5_1 9 Q5_1;
    /// 5 bits, the older kind.
    Q5_0 8 Q5_0;
    /// 4 bits, with 6 in half of the values and down projections.
    Q4_K_M 15 Q4_K;
    /// 4 bits, with 5 in the first values and down projections.
    Q4_K_S 14 Q4_K;
    /// 4 bits with minimums, the older kind.
    Q4_1 3 Q4_1;
    /// 4 bits, the older kind.
    Q4_0 2 Q4_0;
    /// 4 uneven bits.
    IQ4_NL 25 IQ4_NL;
    /// 4 uneven bits with cheaper scales.
    IQ4_XS 30 IQ4_XS;
    /// 3 bits, with 5 in what matters most.
    Q3_K_L 13 Q3_K;
    /// 3 bits, with 4 in what matters most.
    Q3_K_M 12 Q3_K;
    /// 3 bits.
    Q3_K_S 11 Q3_K;
    /// 2 bits, with 3 or 4 in what matters most.
    Q2_K 10 Q2_K;
    /// 2 bits; needs an importance matrix.
    Q2_K_S 21 Q2_K;
    /// 4-bit floats in the experts, 8 bits in the rest.
    MXFP4_MOE 38 MXFP4;
    /// 4-bit floats with 8-bit scales.
    NVFP4 39 NVFP4;
    /// Ternary, for models trained so; embeddings in 4 bits.
    TQ1_0 36 TQ1_0;
    /// Ternary in two bits, for models trained so; embeddings in 4 bits.
    TQ2_0 37 TQ2_0;
    /// One bit, for models trained so.
    Q1_0 40 Q1_0;
    /// Two bits; embeddings in 4 bits.
    Q2_0 41 Q2_0;
}

impl FileType {
    /// The type of a name, in any case; `Q3_K`, `Q4_K`, `Q5_K` and `MXFP4` are short for their usual mix.
    pub fn from_name(name: &str) -> Option<Self> {
        let full = match name.to_ascii_uppercase().as_str() {
            "Q3_K" => "Q3_K_M".to_owned(),
            "Q4_K" => "Q4_K_M".to_owned(),
            "Q5_K" => "Q5_K_M".to_owned(),
            "MXFP4" => "MXFP4_MOE".to_owned(),
            other => other.to_owned(),
        };
        Self::ALL.iter().find(|kind| kind.name() == full).copied()
    }

    /// The type with this value of `general.file_type`.
    pub fn from_id(id: u32) -> Option<Self> {
        Self::ALL.iter().find(|kind| kind.id() == id).copied()
    }
}

impl fmt::Display for FileType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
