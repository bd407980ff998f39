//! An answer as a row of blocks, texts and tool calls, as Responses and Messages have it.

use crate::choice::Delta;

/// What happens to the blocks of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// A text begins.
    Text,
    /// More of the text.
    More(String),
    /// A call of this function begins.
    Call(String),
    /// More of the call's arguments.
    Arguments(String),
    /// The block is complete.
    End,
}

/// A finished block.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    /// A text.
    Text(String),
    /// A function's name and its arguments.
    Call(String, String),
}

/// Follows an answer.
#[derive(Default)]
pub(crate) struct Blocks {
    /// All blocks that have begun; the last one may be open.
    pub list: Vec<Block>,
    open: bool,
}

impl Blocks {
    /// What a delta changes. The last one closes what is open; an answer without anything becomes an empty text.
    pub fn take(&mut self, delta: &Delta) -> Vec<Change> {
        let mut changes = Vec::new();
        let last = delta.finish.is_some();
        if !delta.text.is_empty() || last && self.list.is_empty() && delta.calls.is_empty() {
            if !self.open || !matches!(self.list.last(), Some(Block::Text(_))) {
                self.begin(Block::Text(String::new()), Change::Text, &mut changes);
            }
            if let Some(Block::Text(text)) = self.list.last_mut()
                && !delta.text.is_empty()
            {
                *text += &delta.text;
                changes.push(Change::More(delta.text.clone()));
            }
        }
        for call in &delta.calls {
            if let Some(name) = &call.name {
                let block = Block::Call(name.clone(), String::new());
                self.begin(block, Change::Call(name.clone()), &mut changes);
            }
            if let Some(Block::Call(_, arguments)) = self.list.last_mut()
                && !call.arguments.is_empty()
            {
                *arguments += &call.arguments;
                changes.push(Change::Arguments(call.arguments.clone()));
            }
        }
        if last {
            self.end(&mut changes);
        }
        changes
    }

    fn begin(&mut self, block: Block, change: Change, changes: &mut Vec<Change>) {
        self.end(changes);
        self.list.push(block);
        self.open = true;
        changes.push(change);
    }

    fn end(&mut self, changes: &mut Vec<Change>) {
        if std::mem::take(&mut self.open) {
            changes.push(Change::End);
        }
    }

    /// The index of the block that changes apply to.
    pub fn index(&self) -> usize {
        self.list.len().saturating_sub(1)
    }
}
