//! How a packed matrix stores its numbers, and where each piece of a unit lies.

use super::activations::{BOTH, GROUP};
use super::{GROUP_STEPS, PANEL, STEP, UNIT, UNIT_STEPS};

/// Unsigned codes of some bits, kept in a low plane of 2, 4 or 8 bits and a high plane of the rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// 2 bits.
    U2,
    /// 2 + 1 bits.
    U3,
    /// 4 bits.
    U4,
    /// 4 + 1 bits.
    U5,
    /// 4 + 2 bits.
    U6,
    /// 8 bits.
    U8,
    /// 4 bits that name an entry of a table.
    Table(&'static [i8; 16]),
}

impl Codes {
    /// Bits of a code.
    pub const fn bits(self) -> usize {
        match self {
            Codes::U2 => 2,
            Codes::U3 => 3,
            Codes::U4 | Codes::Table(_) => 4,
            Codes::U5 => 5,
            Codes::U6 => 6,
            Codes::U8 => 8,
        }
    }

    /// Bits of a code in the low plane.
    pub(super) const fn low_bits(self) -> usize {
        match self {
            Codes::U2 | Codes::U3 => 2,
            Codes::U4 | Codes::U5 | Codes::U6 | Codes::Table(_) => 4,
            Codes::U8 => 8,
        }
    }
}

/// What a code, less its offset, is multiplied by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Scale {
    /// An `f16` for every `group` columns: 32, 64, 128 or 256.
    Half {
        /// Columns that share a scale.
        group: usize,
    },
    /// A power of two, `2^(e - 128)`, for every 32 columns; the two below the normal numbers of `f32` count as zero.
    Exponent,
    /// An `f16` for 256 columns times a signed byte for every `sub` columns: 16 or 32.
    Super {
        /// Columns that share a byte.
        sub: usize,
    },
}

/// What is added to a product of code and scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Min {
    /// Nothing.
    Without,
    /// An `f16` for each scale, added; the layout's offset is 0.
    Half,
    /// A byte for each scale: the code of zero, in place of the layout's offset.
    Zero,
    /// An `f16` for 256 columns times a byte for each sub-scale, subtracted.
    Super,
}

/// What the bytes of packed matrices mean: raised whenever a layout puts something elsewhere, so that files which hold them
/// are told apart.
pub const LAYOUT_VERSION: u32 = 1;

/// In the place of the columns of a sum: a unit, in which the sum of a step is multiplied by a whole number that its scale
/// [becomes](super::reference::align).
pub(super) const ALIGNED: usize = UNIT;
/// The same, where sums of 32 columns have whole numbers of their own.
pub(super) const WHOLE_32: usize = UNIT + 32;
/// The same of 16 columns.
pub(super) const WHOLE_16: usize = UNIT + 16;

/// Steps after which a sum is multiplied by the scale of the activations: a group where its parts are steps, else a unit.
pub(super) const fn sum_steps(kind: usize) -> usize {
    match kind {
        STEP => GROUP_STEPS,
        _ => UNIT_STEPS,
    }
}

/// How a matrix is stored: `w = scale * (code - offset) + min`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Layout {
    /// The codes.
    pub codes: Codes,
    /// The code of zero; 0 where `min` says it, and with a table.
    pub offset: u8,
    /// The scales.
    pub scale: Scale,
    /// The minimums.
    pub min: Min,
}

impl Layout {
    /// Symmetric integers of 4 bits, an `f16` scale for each group.
    pub const fn q4(group: usize) -> Layout {
        Layout {
            codes: Codes::U4,
            offset: 8,
            scale: Scale::Half { group },
            min: Min::Without,
        }
    }

    /// Integers of 4 bits with a zero of their own, an `f16` scale and a byte for each group.
    pub const fn q4_asymmetric(group: usize) -> Layout {
        Layout {
            offset: 0,
            min: Min::Zero,
            ..Layout::q4(group)
        }
    }

    /// Symmetric integers of 8 bits, an `f16` scale for each 32.
    pub const fn q8() -> Layout {
        Layout {
            codes: Codes::U8,
            offset: 128,
            scale: Scale::Half { group: 32 },
            min: Min::Without,
        }
    }

    /// Columns that share the scale nearest to the codes.
    pub const fn sub(&self) -> usize {
        match self.scale {
            Scale::Super { sub } => sub,
            Scale::Half { group } => group,
            Scale::Exponent => STEP,
        }
    }

    /// The byte that stands for zero, where no minimum says it; the entries of a table count from 128.
    pub(super) const fn zero(&self) -> i32 {
        match self.codes {
            Codes::Table(_) => 128,
            _ => self.offset as i32,
        }
    }

    /// Columns over which integers are summed: half a step, a step or a group of steps, as their scales allow.
    pub(super) const fn span(&self) -> usize {
        match self.sub() {
            sub if sub >= GROUP_STEPS * STEP => GROUP_STEPS * STEP,
            sub if sub >= STEP => STEP,
            _ => STEP / 2,
        }
    }

    /// Whether the scales of a unit are taken as whole numbers times a power of two, so that integers are summed over all of
    /// it: 4 bits with scales for fewer columns, where no sum of a step leaves 16 bits.
    pub(super) const fn aligned(&self) -> bool {
        let four = matches!(self.codes, Codes::U4) && self.offset == 8;
        let fine = matches!(self.scale, Scale::Half { group: 32 | 64 });
        four && fine && matches!(self.min, Min::Without)
    }

    /// What kernels are made for: [`ALIGNED`], [`WHOLE_32`], [`WHOLE_16`] or the columns of a sum.
    pub(super) const fn kind(&self) -> usize {
        match self.scale {
            Scale::Super { sub: 16 } => WHOLE_16,
            Scale::Super { .. } => WHOLE_32,
            _ if self.aligned() => ALIGNED,
            _ => self.span(),
        }
    }

    /// Whether tiles of bytes multiply it, which are two steps deep.
    pub(super) const fn byte_tiles(&self) -> bool {
        self.kind() > STEP
    }

    /// The parts that integers are summed over: both halves of a step, all of it, or a group of them.
    pub(super) const fn parts(&self) -> std::ops::Range<usize> {
        match self.span() {
            span if span < STEP => 0..BOTH,
            STEP => BOTH..BOTH + 1,
            _ => GROUP..GROUP + 1,
        }
    }

    /// Columns that a matrix's columns are rounded up to.
    pub const fn block(&self) -> usize {
        match self.scale {
            Scale::Super { .. } => UNIT,
            Scale::Half { group } => group,
            Scale::Exponent => STEP,
        }
    }

    /// Bits a weight, scales included.
    pub fn bits_per_weight(&self) -> f64 {
        let unit = self.unit(UNIT_STEPS);
        8.0 * unit.bytes as f64 / (PANEL * UNIT) as f64
    }

    /// Why there are no such matrices: a group or sub-block of another size, codes that have no kernel with their scales,
    /// minimums of another kind than the scales. `None` for a layout that can be packed.
    pub fn problem(&self) -> Option<String> {
        let (codes, min) = (self.codes, self.min);
        match self.scale {
            _ if self.zero() != 0 && min != Min::Without => Some(format!(
                "a code of zero beside minimums of the kind {min:?}"
            )),
            _ if codes == Codes::U6 && !matches!(self.scale, Scale::Super { sub: 16 }) => {
                Some("6 bits have a kernel for scales of 16 columns only".into())
            }
            Scale::Super { sub } if sub != 16 && sub != 32 => {
                Some(format!("a sub-scale for {sub} columns, not 16 or 32"))
            }
            Scale::Super { sub }
                if !matches!(
                    (sub, codes),
                    (16, Codes::U2 | Codes::U3 | Codes::U6)
                        | (32, Codes::U4 | Codes::U5 | Codes::Table(_))
                ) =>
            {
                Some(format!(
                    "{codes:?} have no kernel for a scale of {sub} columns"
                ))
            }
            Scale::Half { group } if ![32, 64, 128, 256].contains(&group) => Some(format!(
                "a scale for {group} columns, not 32, 64, 128 or 256"
            )),
            Scale::Super { .. } if matches!(min, Min::Half | Min::Zero) => {
                Some(format!("minimums of the kind {min:?} beside sub-scales"))
            }
            Scale::Half { .. } | Scale::Exponent if min == Min::Super => {
                Some("sub-minimums without sub-scales".into())
            }
            _ => None,
        }
    }

    /// Where the pieces of a unit of `steps` steps lie.
    ///
    /// # Panics
    /// On a layout with a [`Layout::problem`].
    #[track_caller]
    pub(super) fn unit(&self, steps: usize) -> Unit {
        if let Some(problem) = self.problem() {
            panic!("{problem}");
        }
        let group_steps = match self.scale {
            Scale::Super { .. } => UNIT_STEPS,
            Scale::Half { group } => group / STEP,
            Scale::Exponent => 1,
        };
        let heads = steps.div_ceil(group_steps);
        let (scale, sub) = match self.scale {
            Scale::Half { .. } => (2, 0),
            Scale::Exponent => (1, 0),
            Scale::Super { sub } => (2, STEP / sub),
        };
        let (min, sub_min) = match self.min {
            Min::Without => (0, 0),
            Min::Half => (2, 0),
            Min::Zero => (1, 0),
            Min::Super => (2, sub),
        };
        let mins = heads * scale * PANEL;
        let sub_scales = mins + heads * min * PANEL;
        let sub_mins = sub_scales + steps * sub * PANEL;
        let planes = (sub_mins + steps * sub_min * PANEL).next_multiple_of(64);
        Unit {
            steps,
            group_shift: group_steps.trailing_zeros(),
            mins,
            sub_scales,
            sub_mins,
            planes,
            bytes: planes + steps * self.codes.bits() * 64,
        }
    }
}

/// Offsets in bytes of the pieces of a unit; the scales of the groups come first.
///
/// Every piece has its numbers in the order of the 16 rows: `[groups or steps (, halves), 16]`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Unit {
    /// Steps of the unit.
    pub steps: usize,
    /// Steps that share a scale, as a power of two.
    pub group_shift: u32,
    /// Minimums of the groups.
    pub mins: usize,
    /// Signed bytes of the sub-blocks.
    pub sub_scales: usize,
    /// Minimums of the sub-blocks.
    pub sub_mins: usize,
    /// Codes: low plane then high plane of each step.
    pub planes: usize,
    /// The whole unit.
    pub bytes: usize,
}

impl Unit {
    /// Scales of a row, not counting those of sub-blocks.
    pub fn heads(&self) -> usize {
        (self.steps + (1 << self.group_shift) - 1) >> self.group_shift
    }
}

/// How the units of a panel follow each other: whole ones, then maybe a shorter one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Units {
    pub whole: Unit,
    pub count: usize,
    pub last: Option<Unit>,
}

impl Units {
    pub fn new(layout: &Layout, cols: usize) -> Units {
        let steps = cols.next_multiple_of(layout.block()) / STEP;
        let last = steps % UNIT_STEPS;
        Units {
            whole: layout.unit(UNIT_STEPS),
            count: steps / UNIT_STEPS,
            last: (last > 0).then(|| layout.unit(last)),
        }
    }

    /// Steps of a row.
    pub fn steps(&self) -> usize {
        self.count * UNIT_STEPS + self.last.map_or(0, |unit| unit.steps)
    }

    /// Bytes of a panel.
    pub fn bytes(&self) -> usize {
        self.count * self.whole.bytes + self.last.map_or(0, |unit| unit.bytes)
    }

    /// Number of units.
    pub fn len(&self) -> usize {
        self.count + usize::from(self.last.is_some())
    }

    /// The unit of a number and its first byte in the panel.
    pub fn at(&self, index: usize) -> (Unit, usize) {
        let start = index * self.whole.bytes;
        if index < self.count {
            (self.whole, start)
        } else {
            (self.last.expect("a unit inside the panel"), start)
        }
    }
}
