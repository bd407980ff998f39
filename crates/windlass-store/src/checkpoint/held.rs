//! Files of a checkpoint that wait in memory until they are written.

use std::collections::VecDeque;
use std::io::{self, Write};
use windlass_tensor::kernels::memory::{Buffer, Category, Memory, PAGE};

/// Bytes of the blocks of memory that files wait in: a rank that holds a checkpoint takes a whole number of them.
pub const HELD_BLOCK: usize = 16 << 20;

/// Takes the blocks that `bytes` bytes will wait in from the system, and lets a thread touch their pages before it gives them
/// back to the pool: where a page is new, the first copy into it takes many times longer than the copy.
pub fn prepare_blocks(memory: &Memory, bytes: usize) {
    let block = |_| memory.alloc(HELD_BLOCK, Category::Workspace);
    let mut blocks: Vec<Buffer> = (0..bytes.div_ceil(HELD_BLOCK)).map(block).collect();
    let touch = move || {
        for block in &mut blocks {
            block
                .block_mut()
                .chunks_mut(PAGE)
                .for_each(|page| page[0] = 0);
        }
    };
    let thread = std::thread::Builder::new().name("checkpoint".into());
    // Without a thread the first copy takes its time.
    let _ = thread.spawn(touch);
}

/// Files, one behind another in blocks of memory, which go back to the pool as they are written.
pub(super) struct Held {
    memory: Memory,
    blocks: VecDeque<Buffer>,
    /// Bytes of the last block that are taken.
    filled: usize,
    /// Bytes of the first block that were written already.
    poured: usize,
    files: VecDeque<(String, u64)>,
}

impl Held {
    /// Nothing yet; blocks come from `memory`.
    pub(super) fn new(memory: &Memory) -> Self {
        Held {
            memory: memory.clone(),
            blocks: VecDeque::new(),
            filled: HELD_BLOCK,
            poured: 0,
            files: VecDeque::new(),
        }
    }

    /// Whether a file of this name waits.
    pub(super) fn contains(&self, name: &str) -> bool {
        self.files.iter().any(|(held, _)| held == name)
    }

    /// Starts a file; what is written from now on is its content.
    pub(super) fn begin(&mut self, name: &str) {
        self.files.push_back((name.to_owned(), 0));
    }

    /// Takes the first file out: its name and length.
    pub(super) fn next(&mut self) -> Option<(String, u64)> {
        self.files.pop_front()
    }

    /// Writes the next `bytes` bytes to `out` and gives up the memory that they took.
    pub(super) fn pour(&mut self, bytes: u64, out: &mut dyn Write) -> io::Result<()> {
        let mut left = bytes as usize;
        while left > 0 {
            let block = self.blocks.front().expect("as many bytes as were held");
            let end = HELD_BLOCK.min(self.poured + left);
            out.write_all(&block.block()[self.poured..end])?;
            left -= end - self.poured;
            self.poured = end;
            if end == HELD_BLOCK {
                self.blocks.pop_front();
                self.poured = 0;
            }
        }
        Ok(())
    }
}

impl Write for Held {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.filled == HELD_BLOCK {
            let block = self.memory.alloc(HELD_BLOCK, Category::Workspace);
            self.blocks.push_back(block);
            self.filled = 0;
        }
        let taken = bytes.len().min(HELD_BLOCK - self.filled);
        let block = self.blocks.back_mut().expect("a block with space");
        block.block_mut()[self.filled..self.filled + taken].copy_from_slice(&bytes[..taken]);
        self.filled += taken;
        let file = self.files.back_mut().expect("a file that was begun");
        file.1 += taken as u64;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
