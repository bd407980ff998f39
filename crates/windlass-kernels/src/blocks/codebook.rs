//! Codebook types, `IQ1_S` to `IQ3_S`: eight elements are a point of a lattice, named by its number. Read only.
//!
//! The points are constants of the format. Each book lists some of the numbers that eight digits of base 3, or four of base
//! 8, can make (the first digit counts ones), in rising order; here it is a text with a character for each: the distance
//! from the number before.
//!
//! # Source
//! The points and layouts of `ggml-common.h` in llama.cpp; the texts were made from the arrays of the `gguf` package.

use std::sync::OnceLock;

use half::f16;

use super::BlockType;

/// The points of a type.
struct Book {
    text: &'static str,
    /// What the digits stand for.
    levels: &'static [i8],
    /// Digits of a point: 8, or 4.
    digits: usize,
    points: OnceLock<Vec<[i8; 8]>>,
}

impl Book {
    const fn new(text: &'static str, levels: &'static [i8], digits: usize) -> Self {
        Book {
            text,
            levels,
            digits,
            points: OnceLock::new(),
        }
    }

    /// Point `index`; the second half of a short one is zero.
    fn point(&self, index: usize) -> [i8; 8] {
        self.points.get_or_init(|| self.decode())[index]
    }

    fn decode(&self) -> Vec<[i8; 8]> {
        /// The largest distance of a character; `~` adds it and names no point.
        const FAR: usize = 91;
        let mut next = 0;
        let mut points = Vec::new();
        for byte in self.text.bytes().filter(|byte| *byte > b'"') {
            if byte == b'~' {
                next += FAR;
                continue;
            }
            next += usize::from(byte - b'"');
            let mut number = next - 1;
            let mut point = [0; 8];
            for level in &mut point[..self.digits] {
                *level = self.levels[number % self.levels.len()];
                number /= self.levels.len();
            }
            points.push(point);
        }
        points
    }
}

const TWO_BITS: [i8; 3] = [8, 25, 43];
static IQ2_XXS: Book = Book::new(POINTS_256, &TWO_BITS, 8);
static IQ2_XS: Book = Book::new(POINTS_512, &TWO_BITS, 8);
static IQ2_S: Book = Book::new(POINTS_1024, &TWO_BITS, 8);
static IQ3_XXS: Book = Book::new(FOURS_256, &[4, 12, 20, 28, 36, 44, 52, 62], 4);
static IQ3_S: Book = Book::new(FOURS_512, &[1, 3, 5, 7, 9, 11, 13, 15], 4);
static IQ1: Book = Book::new(POINTS_2048, &[-1, 0, 1], 8);

/// Whether a type is a codebook.
pub(super) const fn is_codebook(block_type: BlockType) -> bool {
    use BlockType::*;
    matches!(
        block_type,
        IQ1_S | IQ1_M | IQ2_XXS | IQ2_XS | IQ2_S | IQ3_XXS | IQ3_S
    )
}

/// Writes the values of the 256 elements of a block of a codebook type.
pub(super) fn values(block_type: BlockType, block: &[u8], out: &mut [f32]) {
    for (i, out) in out.chunks_exact_mut(8).enumerate() {
        let (scale, levels) = eight(block_type, block, i);
        for (out, level) in out.iter_mut().zip(levels) {
            *out = scale * level;
        }
    }
}

fn word16(block: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([block[at], block[at + 1]])
}

fn word32(block: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(block[at..at + 4].try_into().expect("four bytes"))
}

fn half(block: &[u8]) -> f32 {
    f16::from_bits(word16(block, 0)).to_f32()
}

/// The scale of an `IQ1_M` block, whose four nibbles lie in its words of scales.
pub(super) fn scattered_scale(block: &[u8]) -> f16 {
    let nibble = |i: usize| word16(block, 48 + 2 * i) >> 12 << (4 * i);
    f16::from_bits(nibble(0) | nibble(1) | nibble(2) | nibble(3))
}

/// Eight elements of a block: their scale, and what it multiplies.
fn eight(block_type: BlockType, block: &[u8], i: usize) -> (f32, [f32; 8]) {
    // Four bits of each byte belong to each of two.
    let nibble = |at: usize, i: usize| f32::from(block[at + i / 2] >> (4 * (i % 2)) & 15);
    match block_type {
        BlockType::IQ2_XXS => {
            let at = 2 + i / 4 * 8;
            let word = word32(block, at + 4);
            let scale = half(block) * (0.5 + (word >> 28) as f32) * 0.25;
            let point = IQ2_XXS.point(block[at + i % 4].into());
            (scale, signed(point, even(word >> (7 * (i % 4)))))
        }
        BlockType::IQ2_XS => {
            let word = word16(block, 2 + 2 * i);
            let scale = half(block) * (0.5 + nibble(66, i / 2)) * 0.25;
            let point = IQ2_XS.point((word & 511).into());
            (scale, signed(point, even(u32::from(word >> 9))))
        }
        BlockType::IQ2_S => {
            let high = usize::from(block[66 + i / 4] >> (2 * (i % 4)) & 3);
            let scale = half(block) * (0.5 + nibble(74, i / 2)) * 0.25;
            let point = IQ2_S.point(usize::from(block[2 + i]) | high << 8);
            (scale, signed(point, block[34 + i]))
        }
        BlockType::IQ3_XXS => {
            let word = word32(block, 66 + i / 4 * 4);
            let scale = half(block) * (0.5 + (word >> 28) as f32) * 0.5;
            let four = |j: usize| IQ3_XXS.point(block[2 + 2 * i + j].into());
            let point = joined(four(0), four(1));
            (scale, signed(point, even(word >> (7 * (i % 4)))))
        }
        BlockType::IQ3_S => {
            let scale = half(block) * (1.0 + 2.0 * nibble(106, i / 4));
            let four = |j: usize| {
                let at = 2 * i + j;
                let high = usize::from(block[66 + at / 8] >> (at % 8) & 1);
                IQ3_S.point(usize::from(block[2 + at]) | high << 8)
            };
            (scale, signed(joined(four(0), four(1)), block[74 + i]))
        }
        BlockType::IQ1_S => {
            let word = word16(block, 34 + i / 4 * 2);
            let scale = half(block) * f32::from(2 * (word >> 12 & 7) + 1);
            let high = usize::from(word >> (3 * (i % 4)) & 7);
            let point = IQ1.point(usize::from(block[2 + i]) | high << 8);
            (scale, moved(point, word & 0x8000 != 0))
        }
        _ => {
            let scales = word16(block, 48 + i / 8 * 2);
            let scale = scattered_scale(block).to_f32();
            let scale = scale * f32::from(2 * (scales >> (3 * (i / 2 % 4)) & 7) + 1);
            let high = block[32 + i / 2] >> (4 * (i % 2));
            let point = IQ1.point(usize::from(block[i]) | usize::from(high & 7) << 8);
            (scale, moved(point, high & 8 != 0))
        }
    }
}

/// Seven signs, and an eighth that makes their number even.
fn even(signs: u32) -> u8 {
    let signs = (signs & 127) as u8;
    signs | ((signs.count_ones() as u8 & 1) << 7)
}

fn joined(mut first: [i8; 8], second: [i8; 8]) -> [i8; 8] {
    first[4..].copy_from_slice(&second[..4]);
    first
}

fn signed(point: [i8; 8], signs: u8) -> [f32; 8] {
    std::array::from_fn(|j| match signs >> j & 1 {
        0 => f32::from(point[j]),
        _ => -f32::from(point[j]),
    })
}

fn moved(point: [i8; 8], down: bool) -> [f32; 8] {
    let by = if down { -0.125 } else { 0.125 };
    point.map(|level| f32::from(level) + by)
}

const POINTS_256: &str = r"
#$$$$$$($&$$$((&$($(.*$(&0@..$4F<$(,$($&.,$(.($&.06$,:$4@4(&$(.&$($8::Z,h$(,*4.(&0(.4*,R,T(.&.6LBD0f$(4><&fP
N$(82*$T*R$r$(40J>6~':.R~EV$((&$((*&,$(44>*&:*:*,@(.F28,^t$(4&TL&,ZB4(&($F(:<Phr$:lHL,(B^^p(4:@JZ@F&x$P~M~~B
$(6>>..bj$(&04FBD864Htzl(.(P8J\T6,z~{N~YD8@l~'~~tR
";
const POINTS_512: &str = r"
#$$$$$$$$$$$$&$$$$$$$&$($$$&$&$,$$$$$$$$$$($$$&$((&$(4$$$&$(,$(&0*6$$$$$$$&$($$$&$$&,$(4$$$&$(,$(,*>$(0&$>:$
$$$$$(&($((.4*$$(4>(64(N&,$$$$$$$&$($$$&$(*$$(4$$$&$(,$(4.$0$$&44F$$$&$(,$&$.(>$(4X.8R$($2.68&PfL$$$$$$$(,$(
44,$(4(2B6D:&$(2$X>,B.2^&($,860\.:.H&$6$$$$$$$&$($$$$$$(&($(4$$$&$(,$(4&2*$($0$X$$$&$&$,$(4.2$(.(N,*8(P$(4&*
*D,6(2Bp$$$&$((&$(4>$(&0$V@T$$(,*4,4*(R(JB8*.2*D>,$~5:$(4.*.6$~-0@20n4&NzVTbD*D$$$&$(*$$(4$8$$$$&4,(H4F$2(&$
($$0426@P6H>(28,$8*~'D(*,&$(402:6>l66&<((bH$N|JH^BF$&$,*PP(D&$&6>4FJ~W66,$&R((X$P$H2
";
const POINTS_1024: &str = r"
#$$$$$$$$$$$$&$$$$$$$&$$$$$$$&$(&&$$$$$$$$&$($$$&$$$$&$&$($$($($$$&$(*$$$$$&0&&&**$$$$$$$&$$$$$$$$$$$$$$$($$
$$&$&$($$$$$$$$$&$&$$$$$$$&$($$$&$(,$$$$&0&$&$(,$(4$$$&$$$$&&$$$$$$$$&$(&*0$$($$$&*&$&$(,*4,$*&$,D.$$$$$$$&$
$&$$$&$$$$$$$&$$&&$&$($$$$$$$$$$$$&$$$$$$$&$($$$&$2$&$&($(&($2$(4$$$&$$$$&$&$$$$$$$&$($$$&$(,$$$$$$$&$($$$&$
(,$(4&$&$(,$(4<$$$$$&$&*$$$&$(,$:$$$&$(,$(28,(40J$$$&$$$$&&$$($$*(*&0$$($$(*$$($(,$(4*.&$&(:$2&$$$$&$&$($$$&
$(,$(4&$&$(,$(0&>$(42H&($2$(<4$$(\8.>.$6$$$$$$$$$$$&$$$$$$$$$$$($(&$&$($$$&$$$$$$($$$$$$$&$($$$&$(,$($$$((&$
&$(,$:$$$$$$$$$$$$&$$$$$$$&$($$$&$(,$$$$$$$&$($$$&$(*$$(4$$$&$(,$(48($&$$$$&$($$$&$(.(4$$$&$(,$(400$(4X$$$&$
$$$$$$&$$$$$$$&$($$$&$2$$$$$$$&$($$$&$(,$(4&$&$(,$(2$>$$$$$$$&$($$$&$(,$(4$$$&$(,$(4>$(0&X$$$&$(,$(*,>$(4X2L
6&$$&$$$&$(&$&$(.(4$$$&$(,$(420(40B*&$&$(,$(4>$(4*202d2$(J6.<vN*$$$&$&$&($($$$&*&($2$&$$$$&$($$$&$2$(2$&&$$2
$(P$$$$$$$&*$$$&$(,$(4$$$&$(,$(4*6$(2$X&($2$(H*$:8V8$.4*$&$$$$(($$$&$(,$(4&($2$(*H$(4T&$$$&$(,$(400$(4L&*B2D
$(0&V$D&~14&&&*($$(H(>8D(.&$@&$2&$(4D0(2~-V2TP6>$,$&F6
";
const FOURS_256: &str = r"
#$$'$&#$)+;$&$'$)&%$)-.*$$')$)$&,(0&(#$-E56'-.$&(52U96&$702$'$)$'$$-#:$))$Q$'$))D($0+/2-&EJ&45.o0B$)$'$&%+A$
$%$))=&#*$)(#$/#/6)&N&C0:6,=g$-9>)$)$7/'($0+-$=$'/7214_15((.=A47J76-0$.&o61#2(3@AG-C07o%$0T99*(29A0B*K?-&E*9
qN0T2$0?B@GF(hCGSJ0T$$#42N,L='8/07C2A$4f
";
const FOURS_512: &str = r"
###%$###$$$#&('$%$$$'$)%%###$&#&%%&$&)/&'(#&$#%%%&%&(%$$$/%*(&%$)$%(&$/$&%-&$%((%(1,$.$&'(&$1'-%$031)$$.$&'/
&6##$&#$$$#$)%$0$%+(#$%$&')%()$0($,%$#&((%,%,)%%#%((#&'3(-$'$/$)&$&7)%()$1I&%/$=$'$).&3(*#$$$#$$$%$&#$)$$%$/
#%$%$(%&%%&%():%%,$')$,&,%&$%&+$'$)(0-(+%)%&;%)'+/#-/*$',>&6&/$-'<)$$$%)$$'$%$,(*$$)'$/2,&$,(,$.;)&'$&#+$&(0
*('&)3(&/)$-',,/55B$/$-E&((&%%))2,'$$)('((&6$''&,'1%(.'$'$)&E$4-#;.$,C;36:'--(;(&(0&%%.('$$')+B(+,'(/9'#1/'.
((%.,.F.5$YB$0Y$$.$722)?84(-'(*.'1W010%;67=K$W&%+$.$.(2)-1$>%&(%)3;:%08&(':L2B9I
";
const POINTS_2048: &str = r"
#$$$$$%'$&$'($$*'$&$''$&$&#($$$#'(&$&$&$$$#)($$*'$&$''$&$'(('&$$&$$%%$$&$-$$*(((&&#1((($##*$$*$&&##$##$$$$$$
$+%$$$$##$0&.$($$$%#&$(($&-$&$''$&$'(&*'$&$''$&$'($&'#(*#%($&.$$$('$&$''$&$'((%%'$$$$''$&$,#$&'#($(&$&$#%.$$
'%($$$$$$$&$&(&######$$&**$($2$$*''$&$$$&$*($$*(&$'#$#%&'%##$$$##$&$$(&$%#$##$$#%&$&$$##$$$$$$$$##'####$#$$#
#$$$##$$##$##$##$$($##*##$$&&$##$$$%###%$#$##(%%$*&.&*($$$$&$$##$$$(($,0$$&$%)##$&$##$##&&*%#$$&&$+))$)$$$$$
$&&$((&%,$&$''$$$$'((%%'$&$''$$$$'($&()#&($$$$##*''$(('$$%'$&$'(&$(('$$%'$&$'*$$(*##$&$$$(*($&%%.((($&$&$#%&
$$,$%#$$$$$$('$'(((('#('$&*,$&$''$&$'($,'$&$,$&$*%$&(,$&$($$$(''$'#'$&$,$&$'(&$('$&$''$&$'(&*.&$$$$$$2&%&&#$
$$&$##$$&$($$$$##$#'$$$$$&$$'##-($$*(,$&&&+',(.%+($$$$##'#$$$$&$$$$'#(%#$&$$##$$&&$$##$$#$####%$##$&##$&$##$
#'$$$%%'#$$$$&$$$$%##$#$&$$&%&&#($$*(%&')'$&$&$$$(($$$((%#%#%#$&$$&&&$####$$$$#%($&$##&$$$22$$($$&&0,($##$&$
&$$&$&$&$##$($*$($%#&$($##$$####$&##$$$##$$########$$##$&$($##$$&&$&($&$$*$&$$##$&$+'$$%#&+#($####%%$$$$##$#
##$#####$####$$($$$##$%$#&$####$$#####$#$$##$$#######$##########$#####$$#%###$####%$##$$###$##%$#$#$#######%
%#############$$#%&$####$%&%$###'##$$&$&)'$$$$####$$##)'$$$$&(%#$&$$##$(($##$$########$$##$%%%%$####(*%)&#&#
$($#%%###&$$$$)%$##$$.*$$(*(&##$$$$$%/*($$$&$(#%$(%%%#$(#%&'%$(&$.&$-#&*##%/(&*1#$#%$&$$$$$$$$##$##$$*#%$$##
##$$$&($$$%#$0##$$#$##$%$##$)$#$%#$#%$##''(''##$&$$$$###$#&$%$$&&$##$%$%1$((,$&$((('*'$(&($$$$#%##&$##$$&&%#
''($#%.&#/$&$&$$&#%))%$(&$&$,$&$''#$$$('$&$''$&$'($$$(($&$$$###'$$(%'$$('$&$''$&$-$&('$&$''$&$/&.$)%&$$&0&.(
&$&($$#%$&$##$#'##$$$$$$$$$*0&$(($&##&%#$&%'()&($&$''$&$$%($&(%$$&$''$&$'#'$$*($$$$$$&$$,,$('$&$''$&$'($$/$&
$''$&$'(&##((&$($$*#'($$$(($$$$&$$$$$$$&'#$##$&$*$($$&$$$(($&(*$$$$$$*$(*$-%$$&&$*&*$$####$##$*$(##$&($&$$##
$##$%%%#$$##$$########$$##$%%$&####$##$$$$$$(&%$'$($#%#$#$($'#&#%##*$$(,$((&&$$#%&#+(&$(*$$$$$$$##$$&$$$$$$#
#$&$#%$$($$&$&*++*$$$&$&.($##/$&$''$&$'($$$-$&$''$&$'%%$$$#1$%%$$$$,'$%$/&$#)&&$'(&$('$&$''$&$3(($(%#$$$%###
(>$$$$$*$&$($##$(&$$##$&$$2(&%$%*$%%$##%$.&&#$%$$&$&$,$&$-$$$-$&$''$&$'*&%%(*&&$&$-'/$&$,$&$-$$/$&$''$&$
";
