//! Who computes what in the next pass: tokens, not phases.
//!
//! A sequence wants the keys and values of all its tokens and has those of the first `computed`. A pass hands out a
//! budget of tokens (Dynamic SplitFuse): first to sequences that miss one token, then to the others in the order of
//! their arrival, the last one in part. A waiting sequence is let in when all its tokens have a place in free blocks,
//! and nobody overtakes it. Where a block is missing later, the youngest sequence gives back all of its own and waits
//! to compute them again; nobody is let in then until another one has left. So the oldest one always goes on.
//!
//! Plain data in and out: the scheduler knows no model, no text, no sampling and no time.

use super::blocks::{Block, BlockPool, parent_of};
pub use super::plan::{Arrival, Counts, Limits, Next, Plan, RequestId, SequenceId, Work};
use crate::InferError;
use std::collections::VecDeque;

#[derive(Debug)]
struct Sequence {
    id: SequenceId,
    tokens: Vec<u32>,
    computed: usize,
    table: Vec<Block>,
    samples: usize,
    /// With `every_row`, the tokens whose results have been handed out: they need not be computed again.
    delivered: Option<usize>,
    root: u64,
    /// Whether it has been let in before.
    known: bool,
}

impl Sequence {
    fn missing(&self) -> usize {
        self.tokens.len() - self.computed
    }

    /// The tokens that may come from the cache: the last one's result is always wanted.
    fn reusable(&self) -> &[u32] {
        let last = self.tokens.len() - 1;
        &self.tokens[..self.delivered.map_or(last, |n| n.min(last))]
    }
}

/// Decides pass by pass: [`Scheduler::schedule`], compute, [`Scheduler::update`].
#[derive(Debug)]
pub struct Scheduler {
    limits: Limits,
    pool: BlockPool,
    /// In the order of age, all of them older than those that wait.
    running: Vec<Sequence>,
    waiting: VecDeque<Sequence>,
    requests: u64,
    /// A sequence has lost its blocks, and none has left since; so one is running.
    tight: bool,
    /// The plan of the last pass, for its memory; none while a pass is under way.
    spare: Option<Plan>,
    counts: Counts,
}

impl Scheduler {
    /// A scheduler without sequences.
    ///
    /// # Errors
    /// [`InferError::Setting`] names a limit of zero.
    pub fn new(limits: Limits) -> Result<Self, InferError> {
        for (flag, value) in [
            ("token-budget", limits.token_budget),
            ("max-sequences", limits.max_sequences),
            ("max-queue", limits.max_waiting),
            ("kv-blocks", limits.blocks),
            ("block-len", limits.block_len),
        ] {
            if value == 0 {
                return Err(InferError::Setting {
                    flag,
                    value: "0".to_owned(),
                    rule: "1 or more",
                    hint: "leave out the flag for the default",
                });
            }
        }
        Ok(Scheduler {
            pool: BlockPool::new(limits.blocks, limits.block_len, limits.prefix_cache),
            limits,
            running: Vec::new(),
            waiting: VecDeque::new(),
            requests: 0,
            tight: false,
            spare: Some(Plan::default()),
            counts: Counts::default(),
        })
    }

    /// The limits.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// Sets the tokens of a pass from the next one on (1 for 0).
    pub fn set_token_budget(&mut self, tokens: usize) {
        self.limits.token_budget = tokens.max(1);
    }

    /// The most tokens that a sequence can have computed.
    pub fn capacity(&self) -> usize {
        self.limits.blocks.saturating_mul(self.limits.block_len)
    }

    /// Takes a request; it waits until [`Scheduler::schedule`] lets it in.
    ///
    /// # Errors
    /// [`InferError::Busy`] when too many wait, [`InferError::NoRoom`] when it can never have enough blocks,
    /// [`InferError::Empty`] without a token, [`InferError::Setting`] for no samples or too many.
    pub fn submit(&mut self, arrival: Arrival) -> Result<RequestId, InferError> {
        let most = arrival.most_tokens.max(arrival.tokens.len());
        if most > self.capacity() {
            return Err(InferError::NoRoom {
                tokens: most,
                capacity: self.capacity(),
            });
        }
        if arrival.tokens.is_empty() {
            return Err(InferError::Empty {
                what: "the prompt",
                hint: "give at least one token to continue",
            });
        }
        if arrival.samples == 0 || arrival.samples > self.limits.max_sequences {
            return Err(InferError::Setting {
                flag: "samples",
                value: arrival.samples.to_string(),
                rule: "1 or more, and at most the sequences computed side by side",
                hint: "ask for fewer, or allow more with --max-sequences",
            });
        }
        if self.waiting.len() >= self.limits.max_waiting {
            return Err(InferError::Busy {
                waiting: self.waiting.len(),
            });
        }
        let request = RequestId(self.requests);
        self.requests += 1;
        self.waiting.push_back(Sequence {
            id: SequenceId { request, sample: 0 },
            tokens: arrival.tokens,
            computed: 0,
            table: Vec::new(),
            samples: arrival.samples,
            delivered: arrival.every_row.then_some(0),
            root: arrival.root,
            known: false,
        });
        Ok(request)
    }

    /// Whether there is no sequence.
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// The tokens of a sequence so far.
    pub fn tokens(&self, id: SequenceId) -> Option<&[u32]> {
        let found = match find(&self.running, id) {
            Ok(at) => &self.running[at],
            Err(_) => self.waiting.iter().find(|s| s.id == id)?,
        };
        Some(&found.tokens)
    }

    /// Counts as of now.
    pub fn counts(&self) -> Counts {
        Counts {
            running: self.running.len(),
            waiting: self.waiting.len(),
            blocks_used: self.pool.len() - self.pool.available(),
            blocks_cached: self.pool.cached(),
            blocks: self.pool.len(),
            ..self.counts
        }
    }

    /// Drops sequences and gives their blocks back; those of ids that are not there are no error.
    ///
    /// # Panics
    /// While a pass is under way.
    #[track_caller]
    pub fn cancel(&mut self, dropped: impl Fn(SequenceId) -> bool) {
        assert!(self.spare.is_some(), "a sequence dropped during a pass");
        self.waiting.retain(|s| !dropped(s.id));
        let mut at = 0;
        while at < self.running.len() {
            match dropped(self.running[at].id) {
                true => self.remove(at),
                false => at += 1,
            }
        }
    }

    /// Decides the next pass. It has work whenever a sequence is there.
    ///
    /// # Panics
    /// When the last plan has not come back by [`Scheduler::update`].
    #[track_caller]
    pub fn schedule(&mut self) -> Plan {
        let plan = self.spare.take();
        let mut plan = plan.expect("the last plan comes back before the next one is made");
        plan.clear();
        let mut budget = self.limits.token_budget;
        self.plan_next_tokens(&mut plan, &mut budget);
        for at in 0..self.running.len() {
            let missing = self.running[at].missing();
            if missing > 1 && budget > 0 {
                self.assign(&mut plan, at, missing, &mut budget);
            }
        }
        self.admit(&mut plan, &mut budget);
        plan
    }

    /// Sequences that miss one token, the oldest first. They may need a block.
    fn plan_next_tokens(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut at = 0;
        while at < self.running.len() && *budget > 0 {
            if self.running[at].missing() == 1 {
                while at < self.running.len() && !self.make_room(at, plan) {
                    let youngest = self.running.pop().expect("one is at this place");
                    self.preempt(youngest, plan);
                }
                if at < self.running.len() {
                    self.assign(plan, at, 1, budget);
                }
            }
            at += 1;
        }
    }

    /// Gives a sequence a block of its own for its next token; `false` when there is none.
    fn make_room(&mut self, at: usize, plan: &mut Plan) -> bool {
        let sequence = &mut self.running[at];
        let index = sequence.computed / self.limits.block_len;
        let held = sequence.table.get(index);
        if held.is_some_and(|block| !self.pool.is_shared(block)) {
            return true;
        }
        let Some(block) = self.pool.take() else {
            return false;
        };
        if index == sequence.table.len() {
            sequence.table.push(block);
        } else {
            plan.copies
                .push((sequence.table[index].index(), block.index()));
            let shared = std::mem::replace(&mut sequence.table[index], block);
            self.pool.release(shared);
        }
        true
    }

    fn preempt(&mut self, mut sequence: Sequence, plan: &mut Plan) {
        plan.preempted.push(sequence.id);
        self.counts.preemptions += 1;
        self.tight = true;
        self.retire(&mut sequence);
        sequence.computed = 0;
        let younger = self.waiting.iter().position(|s| s.id > sequence.id);
        let place = younger.unwrap_or(self.waiting.len());
        self.waiting.insert(place, sequence);
    }

    /// Adds the next tokens of a sequence to the pass, as many as the budget has.
    fn assign(&mut self, plan: &mut Plan, at: usize, wanted: usize, budget: &mut usize) {
        let sequence = &self.running[at];
        let tokens = wanted.min(*budget);
        *budget -= tokens;
        let first = plan.tables.len();
        let used = self.pool.needed(sequence.computed + tokens);
        let blocks = sequence.table[..used].iter().map(Block::index);
        plan.tables.extend(blocks);
        plan.work.push(Work {
            id: sequence.id,
            start: sequence.computed,
            tokens,
            samples: match tokens == sequence.missing() {
                true => sequence.samples,
                false => 0,
            },
            table: first..plan.tables.len(),
        });
    }

    /// Lets waiting sequences in, in the order of age, while budget, blocks and places last.
    fn admit(&mut self, plan: &mut Plan, budget: &mut usize) {
        let mut places = self.limits.max_sequences;
        places -= self.running.iter().map(|s| s.samples).sum::<usize>();
        while let Some(first) = self.waiting.front() {
            if self.tight || *budget == 0 || first.samples > places {
                break;
            }
            let found = self.pool.find(first.root, first.reusable());
            let idle = |block: &&u32| self.pool.is_idle(**block);
            let lost = found.whole.iter().filter(idle).count();
            let fresh = self.pool.needed(first.tokens.len()) - found.whole.len();
            if fresh + lost > self.pool.available() {
                break;
            }
            let mut sequence = self.waiting.pop_front().expect("one is there");
            places -= sequence.samples;
            let table = &mut sequence.table;
            table.extend(found.whole.iter().map(|&block| self.pool.share(block)));
            for _ in 0..fresh {
                table.push(self.pool.take().expect("blocks were counted"));
            }
            sequence.computed = found.whole.len() * self.limits.block_len;
            if let Some((block, rows)) = found.part {
                // The source may be taken in the same pass, even by this sequence: copies come before all writing.
                let to = table[found.whole.len()].index();
                if to != block {
                    plan.copies.push((block, to));
                }
                sequence.computed += rows;
            }
            plan.admitted.push((sequence.id, sequence.computed));
            if !sequence.known {
                sequence.known = true;
                self.counts.prefix_queries += sequence.tokens.len() as u64;
                self.counts.prefix_hits += sequence.computed as u64;
            }
            let missing = sequence.missing();
            self.running.push(sequence);
            self.assign(plan, self.running.len() - 1, missing, budget);
        }
    }

    /// Takes a plan back that has been computed, with what follows in each sequence whose tokens are all computed now
    /// (samples that began with this pass included).
    ///
    /// # Panics
    /// When the results are not those that the plan asks for.
    #[track_caller]
    pub fn update(&mut self, plan: Plan, results: &[(SequenceId, Next)]) {
        assert!(self.spare.is_none(), "a plan came back twice");
        for work in &plan.work {
            let at =
                find(&self.running, work.id).expect("sequences of a plan stay until it is back");
            self.counts.computed_tokens += work.tokens as u64;
            self.advance(at, work);
        }
        let wanted: usize = plan.work.iter().map(|w| w.samples).sum();
        assert_eq!(results.len(), wanted, "results against those asked for");
        for &(id, next) in results {
            let at = find(&self.running, id).expect("results are those of the plan");
            assert_eq!(self.running[at].missing(), 0, "{id:?} is not computed");
            match next {
                Next::Token(token) => self.running[at].tokens.push(token),
                Next::Finished => self.remove(at),
            }
        }
        self.spare = Some(plan);
    }

    /// Counts what a sequence has computed, makes its full blocks findable, and begins its samples.
    fn advance(&mut self, at: usize, work: &Work) {
        let block_len = self.limits.block_len;
        let sequence = &mut self.running[at];
        let full = sequence.computed / block_len;
        sequence.computed += work.tokens;
        sequence.delivered = sequence.delivered.map(|n| n.max(sequence.computed));
        for index in full..sequence.computed / block_len {
            let parent = parent_of(&sequence.table, sequence.root, index);
            let tokens = &sequence.tokens[index * block_len..][..block_len];
            let block = sequence.table.remove(index);
            let block = self.pool.seal(block, parent, tokens);
            sequence.table.insert(index, block);
        }
        if work.samples > 0 {
            sequence.samples = 1;
        }
        for sample in 1..work.samples {
            let first = &self.running[at];
            let table = first
                .table
                .iter()
                .map(|block| self.pool.share(block.index()));
            let sequence = Sequence {
                id: SequenceId { sample, ..first.id },
                tokens: first.tokens.clone(),
                computed: first.computed,
                table: table.collect(),
                samples: 1,
                delivered: first.delivered,
                root: first.root,
                known: true,
            };
            self.running.insert(at + sample, sequence);
        }
    }

    fn remove(&mut self, at: usize) {
        let mut sequence = self.running.remove(at);
        self.retire(&mut sequence);
        self.tight = false;
    }

    fn retire(&mut self, sequence: &mut Sequence) {
        let tokens = &sequence.tokens[..sequence.computed];
        self.pool.retire(&mut sequence.table, sequence.root, tokens);
    }
}

fn find(running: &[Sequence], id: SequenceId) -> Result<usize, usize> {
    running.binary_search_by_key(&id, |s| s.id)
}
