//! Keys and values of the tokens that sequences have already seen, in blocks.

use crate::DecoderConfig;
use std::sync::{Arc, Mutex};
use windlass_tensor::kernels::attention::{KvType, PAGE, PagedKv, Rows};
use windlass_tensor::{Cpu, Tensor, each_dtype};

/// Keys and values of all sequences of one model, for every layer. A block holds [`KvBlocks::LEN`] tokens of one sequence;
/// who owns which blocks is the caller's business.
pub struct KvBlocks {
    /// One for each layer, or one for all in turn.
    layers: Vec<PagedKv>,
    kind: KvType,
    blocks: usize,
}

impl KvBlocks {
    /// Tokens of a block.
    pub const LEN: usize = PAGE;

    /// Room for `blocks` blocks. Memory is taken as it is written.
    pub fn new(cpu: &Cpu, config: &DecoderConfig, kind: KvType, blocks: usize) -> Self {
        Self::of_layers(cpu, config, kind, blocks, config.num_hidden_layers())
    }

    /// Room for one pass over whole sequences: every layer writes over what the one before it has kept.
    pub fn passing(cpu: &Cpu, config: &DecoderConfig, kind: KvType, blocks: usize) -> Self {
        Self::of_layers(cpu, config, kind, blocks, 1)
    }

    fn of_layers(
        cpu: &Cpu,
        config: &DecoderConfig,
        kind: KvType,
        blocks: usize,
        layers: usize,
    ) -> Self {
        let (heads, head_dim) = (config.num_key_value_heads, config.head_dim);
        let layer = |_| PagedKv::new(&cpu.memory, kind, heads, head_dim, blocks);
        KvBlocks {
            layers: (0..layers).map(layer).collect(),
            kind,
            blocks,
        }
    }

    /// Bytes of one block in all layers.
    pub fn block_bytes(config: &DecoderConfig, kind: KvType) -> usize {
        let token = kind.bytes(config.num_key_value_heads, config.head_dim);
        config.num_hidden_layers() * Self::LEN * token
    }

    /// How keys and values are stored.
    pub fn kind(&self) -> KvType {
        self.kind
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.blocks
    }

    /// Copies a block over another, in every layer.
    ///
    /// # Panics
    /// When a block does not exist.
    #[track_caller]
    pub fn copy_block(&mut self, from: u32, to: u32) {
        for layer in &mut self.layers {
            layer.copy_page(from as usize, to as usize);
        }
    }

    /// Stores new tokens' keys and values in a layer, and returns that layer.
    #[track_caller]
    pub(crate) fn append(
        &mut self,
        cpu: &Cpu,
        layer: usize,
        (k, v): (&Tensor, &Tensor),
        slots: &[u32],
    ) -> &PagedKv {
        let layer = layer % self.layers.len();
        let layer = &mut self.layers[layer];
        let width = k.cols();
        each_dtype!(k.dtype(), E => {
            let [k, v] = [k, v].map(|x| Rows::new(x.as_slice::<E>(), width));
            layer.write(&cpu.pool, k, v, slots);
        });
        layer
    }
}

/// Where the tokens of a batch find earlier ones, and where their own keys and values go.
#[derive(Clone)]
pub struct Cached {
    /// The blocks.
    pub blocks: Arc<Mutex<KvBlocks>>,
    /// `[T]`: block times [`KvBlocks::LEN`] plus the place in it.
    pub slots: Arc<[u32]>,
    /// The blocks of each sequence, one after another; `Segment::kv_start` is `LEN` times the place of its first one.
    pub table: Arc<[u32]>,
}
