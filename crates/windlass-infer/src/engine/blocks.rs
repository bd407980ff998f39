//! Which blocks of the key-value memory are in use, and what the others still hold. Knows numbers of blocks, not the
//! memory itself.
//!
//! A block with content stands in a tree: its parent is the block before it in the text, a child is found by its
//! tokens. A text that begins like an earlier one finds that one's blocks by walking down from the root, token by
//! token exact, the last block maybe in part. Blocks without an owner keep their content until they are needed: the
//! longest unused one goes first, and that is never a parent of one that stays, since whoever holds a block holds its
//! parents and gives them back after it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

/// A share of a block: neither copied nor dropped, only given back to [`BlockPool::release`].
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a block that is not given back is lost"]
pub(super) struct Block(u32);

impl Block {
    /// Its number in the memory.
    pub(super) fn index(&self) -> u32 {
        self.0
    }
}

/// What comes before a block of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Parent {
    /// Nothing. Texts of different roots share no block.
    Root(u64),
    /// The text that ends with this block.
    Block(u32),
}

/// What a block holds for others to find.
#[derive(Debug)]
struct Content {
    parent: Parent,
    /// The tokens whose keys and values lie in it; fewer than its rows in the last block of a text.
    tokens: Arc<[u32]>,
    /// When its last owner gave it back.
    released: u64,
}

/// What is left of an earlier text that begins like a new one.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Found {
    /// Blocks that can be shared: the first ones of the text.
    pub(super) whole: Vec<u32>,
    /// The block whose first rows can be copied into the next one, and how many.
    pub(super) part: Option<(u32, usize)>,
}

/// All blocks: owners, content, and the order in which they are taken.
#[derive(Debug)]
pub(super) struct BlockPool {
    block_len: usize,
    caching: bool,
    /// Owners of each block.
    owners: Vec<u32>,
    content: Vec<Option<Content>>,
    children: HashMap<Parent, BTreeMap<Arc<[u32]>, u32>>,
    /// Blocks without owner and content.
    blank: Vec<u32>,
    /// Blocks with content and without an owner, the longest unused one first.
    idle: BTreeMap<u64, u32>,
    clock: u64,
}

impl BlockPool {
    /// `blocks` empty blocks of `block_len` tokens; with `caching`, what they held can be found again.
    pub(super) fn new(blocks: usize, block_len: usize, caching: bool) -> Self {
        BlockPool {
            block_len,
            caching,
            owners: vec![0; blocks],
            content: (0..blocks).map(|_| None).collect(),
            children: HashMap::new(),
            blank: (0..blocks as u32).rev().collect(),
            idle: BTreeMap::new(),
            clock: 0,
        }
    }

    /// All blocks.
    pub(super) fn len(&self) -> usize {
        self.owners.len()
    }

    /// Blocks that nobody owns.
    pub(super) fn available(&self) -> usize {
        self.blank.len() + self.idle.len()
    }

    /// Blocks that nobody owns, but whose content can still be found.
    pub(super) fn cached(&self) -> usize {
        self.idle.len()
    }

    /// Blocks for so many tokens.
    pub(super) fn needed(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.block_len)
    }

    /// Takes a block whose content, if any, is forgotten; none when all have owners.
    pub(super) fn take(&mut self) -> Option<Block> {
        let index = match self.blank.pop() {
            Some(index) => index,
            None => {
                let (_, index) = self.idle.pop_first()?;
                self.forget(index);
                index
            }
        };
        self.owners[index as usize] = 1;
        Some(Block(index))
    }

    /// One more share of a block that has an owner or content.
    pub(super) fn share(&mut self, index: u32) -> Block {
        let owners = &mut self.owners[index as usize];
        if *owners == 0 {
            let content = self.content[index as usize].as_ref();
            let content = content.expect("a block without owner and content is not shared");
            self.idle.remove(&content.released);
        }
        *owners += 1;
        Block(index)
    }

    /// Whether someone else owns the block too.
    pub(super) fn is_shared(&self, block: &Block) -> bool {
        self.owners[block.0 as usize] > 1
    }

    /// Whether nobody owns the block.
    pub(super) fn is_idle(&self, index: u32) -> bool {
        self.owners[index as usize] == 0
    }

    /// Gives a share back.
    pub(super) fn release(&mut self, block: Block) {
        let index = block.0 as usize;
        self.owners[index] -= 1;
        if self.owners[index] > 0 {
            return;
        }
        match &mut self.content[index] {
            Some(content) => {
                self.clock += 1;
                content.released = self.clock;
                self.idle.insert(self.clock, block.0);
            }
            None => self.blank.push(block.0),
        }
    }

    /// What is left of a text, whose first tokens these are.
    pub(super) fn find(&self, root: u64, mut tokens: &[u32]) -> Found {
        let mut found = Found::default();
        let mut parent = Parent::Root(root);
        while let Some(children) = self.children.get(&parent) {
            let wanted = &tokens[..tokens.len().min(self.block_len)];
            let Some((block, same)) = nearest(children, wanted) else {
                break;
            };
            if same < self.block_len {
                found.part = (same > 0).then_some((block, same));
                break;
            }
            found.whole.push(block);
            parent = Parent::Block(block);
            tokens = &tokens[same..];
        }
        found
    }

    /// Makes a full block findable. Where another one holds the same already, that one takes its place.
    pub(super) fn seal(&mut self, block: Block, parent: Parent, tokens: &[u32]) -> Block {
        if !self.caching || self.content[block.0 as usize].is_some() {
            return block;
        }
        let known = self.children.get(&parent).and_then(|c| c.get(tokens));
        match known.copied() {
            Some(known) => {
                let known = self.share(known);
                self.release(block);
                known
            }
            None => {
                self.keep(block.0, parent, tokens);
                block
            }
        }
    }

    /// Gives back all blocks of a text, of which `tokens` have been computed and all full blocks are sealed.
    pub(super) fn retire(&mut self, table: &mut Vec<Block>, root: u64, tokens: &[u32]) {
        let full = tokens.len() / self.block_len;
        let tail = &tokens[full * self.block_len..];
        while let Some(block) = table.pop() {
            let own = self.owners[block.0 as usize] == 1;
            if self.caching && own && table.len() == full && !tail.is_empty() {
                let parent = parent_of(table, root, full);
                let children = self.children.get(&parent);
                if children.is_none_or(|c| nearest(c, tail).is_none_or(|(_, n)| n < tail.len())) {
                    self.keep(block.0, parent, tail);
                }
            }
            self.release(block);
        }
    }

    fn keep(&mut self, index: u32, parent: Parent, tokens: &[u32]) {
        let tokens: Arc<[u32]> = tokens.into();
        let children = self.children.entry(parent).or_default();
        children.insert(tokens.clone(), index);
        self.content[index as usize] = Some(Content {
            parent,
            tokens,
            released: 0,
        });
    }

    fn forget(&mut self, index: u32) {
        let content = self.content[index as usize].take();
        let content = content.expect("an idle block has content");
        debug_assert!(!self.children.contains_key(&Parent::Block(index)));
        let siblings = self.children.get_mut(&content.parent);
        let siblings = siblings.expect("a block with content is its parent's child");
        siblings.remove(&content.tokens);
        if siblings.is_empty() {
            self.children.remove(&content.parent);
        }
    }
}

/// The parent of block `index` of a text.
pub(super) fn parent_of(table: &[Block], root: u64, index: usize) -> Parent {
    match index.checked_sub(1) {
        Some(before) => Parent::Block(table[before].0),
        None => Parent::Root(root),
    }
}

/// The child that has most first tokens in common with the wanted ones, and how many. In the order of tokens that is
/// one of the two neighbors.
fn nearest(children: &BTreeMap<Arc<[u32]>, u32>, wanted: &[u32]) -> Option<(u32, usize)> {
    use std::ops::Bound::{Included, Unbounded};
    let mut below = children.range::<[u32], _>((Unbounded, Included(wanted)));
    let mut above = children.range::<[u32], _>((Included(wanted), Unbounded));
    let neighbors = [below.next_back(), above.next()];
    let common = |(tokens, block): (&Arc<[u32]>, &u32)| {
        let same = tokens.iter().zip(wanted).take_while(|(a, b)| a == b);
        (*block, same.count())
    };
    let neighbors = neighbors.into_iter().flatten().map(common);
    neighbors.max_by_key(|(_, same)| *same)
}
