//! Step edges, from the calls' own period.
//!
//! A token stands for one call. Drains of the GPU between two calls are put into the sequence as tokens of their own:
//! with equal buckets the calls alone look like a period of one. The pattern found is then followed call by call. An
//! edge lies at the first drain after the last call of the pattern, or, if the GPU was not drained there, at the
//! begin of the next call. Where the sequence leaves the pattern, time until it returns is *between* steps.
//!
//! A job that waits for its GPU only every so many steps shows a pattern of that many steps. Inside it the calls' own
//! period, told apart by whether a batch was copied to the device before a call, gives the step; edges then all lie at
//! the begin of a step's first call, so that steps with and without a drain are measured alike.
//!
//! Where in the pattern a step begins is otherwise free; of the places with a drain the one is taken whose rotation of the
//! pattern is smallest, so that all ranks of a job choose the same.

use std::collections::VecDeque;

use stallscope_attribution::steps::{find_period, find_period_timed};

use super::marks::mix;

/// Token of a drain.
const DRAIN: u64 = u64::MAX;
/// Calls and drains kept: three of the longest patterns that are looked for.
const MOST_ITEMS: usize = 24_576;
/// No search before this many items.
const LEAST_ITEMS: usize = 12;
/// No search before the calls span this time, ns: what comes first is seldom the training loop.
const LEAST_SPAN_NS: u64 = 2_000_000_000;
/// Steps in a row that ended without the drain they should end with, before the pattern is doubted.
const MOST_UNDRAINED: u32 = 8;

/// Time up to `end_ns`, from the end of the region before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Region {
    /// Where it ends.
    pub(super) end_ns: u64,
    /// Calls of the step it is; `None` for time between steps.
    pub(super) step_calls: Option<u32>,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    token: u64,
    at_ns: u64,
    /// A batch was copied to the device since the call before.
    fed: bool,
}

impl Item {
    /// The token, told apart by feeding.
    const fn fed_token(self) -> u64 {
        if self.fed { mix(self.token, 1) } else { self.token }
    }
}

#[derive(Debug)]
struct Pattern {
    calls: Vec<u64>,
    /// Whether a drain is usual before the call of that position.
    drains: Vec<bool>,
    /// Only one distinct call: order alone cannot tell the position.
    uniform: bool,
    /// The calls are told apart by feeding, and edges lie at calls.
    fed: bool,
}

/// What the calls of a finder are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Calls {
    /// Collectives; drains are given beside them.
    Collectives,
    /// Drains, each with the launches before it as its token.
    Drains,
}

/// Follows one sequence of calls.
#[derive(Debug)]
pub(super) struct StepFinder {
    calls: Calls,
    items: VecDeque<Item>,
    /// Items since the last whole pattern.
    since_whole: usize,
    next_search: usize,
    pattern: Option<Pattern>,
    position: usize,
    in_step: bool,
    /// The pattern is complete, its end not yet known.
    whole: bool,
    drained_ns: Option<u64>,
    undrained: u32,
    last_call_ns: Option<u64>,
    fed: bool,
}

/// Calls and drains that fit no step, after which a pattern is given up.
fn most_astray(pattern: &Pattern) -> usize {
    4 * pattern.calls.len() + 64
}

/// Calls and drains that the search for the next pattern looks at, when one is given up.
fn needed_items(pattern: &Pattern) -> usize {
    most_astray(pattern) + 2 * pattern.calls.len() + 64
}

impl StepFinder {
    /// A finder that has seen nothing.
    pub(super) const fn new(calls: Calls) -> Self {
        Self {
            calls,
            items: VecDeque::new(),
            since_whole: 0,
            next_search: LEAST_ITEMS,
            pattern: None,
            position: 0,
            in_step: false,
            whole: false,
            drained_ns: None,
            undrained: 0,
            last_call_ns: None,
            fed: false,
        }
    }

    /// Whether a pattern is being followed.
    pub(super) const fn has_pattern(&self) -> bool {
        self.pattern.is_some()
    }

    /// Begin of the last call.
    pub(super) const fn last_call_ns(&self) -> Option<u64> {
        self.last_call_ns
    }

    /// A call that tells nothing of steps was made.
    pub(super) const fn heard(&mut self, at_ns: u64) {
        self.last_call_ns = Some(at_ns);
    }

    /// A batch was copied to the device.
    pub(super) const fn fed(&mut self) {
        self.fed = true;
    }

    /// A call began. Regions that are now complete are appended.
    pub(super) fn call(&mut self, token: u64, at_ns: u64, regions: &mut Vec<Region>) {
        self.last_call_ns = Some(at_ns);
        let item = Item {
            token,
            at_ns,
            fed: std::mem::take(&mut self.fed),
        };
        self.keep(item);
        if let Some(pattern) = &self.pattern {
            let needed = needed_items(pattern);
            self.follow_call(item, regions);
            self.drop_a_lost_pattern();
            self.trim(needed);
        } else if self.items.len() >= self.next_search && self.span_ns() >= LEAST_SPAN_NS {
            self.next_search = self.items.len() + self.items.len() / 4;
            self.pattern = self.search();
            if self.pattern.is_some() {
                self.follow_kept(regions);
            }
        }
    }

    /// The GPU is drained from `at_ns` on.
    pub(super) fn drained(&mut self, at_ns: u64, regions: &mut Vec<Region>) {
        if self.items.back().is_none_or(|last| last.token == DRAIN) {
            return;
        }
        self.keep(Item {
            token: DRAIN,
            at_ns,
            fed: false,
        });
        self.follow_drain(at_ns, regions);
    }

    fn span_ns(&self) -> u64 {
        match (self.items.front(), self.items.back()) {
            (Some(first), Some(last)) => last.at_ns.saturating_sub(first.at_ns),
            _ => 0,
        }
    }

    fn keep(&mut self, item: Item) {
        if self.items.len() == MOST_ITEMS {
            self.items.pop_front();
            self.next_search = self.next_search.min(MOST_ITEMS);
        }
        self.items.push_back(item);
        self.since_whole += 1;
    }

    /// Forgets what no search will look at: while a pattern is followed, more than a few of its periods.
    fn trim(&mut self, needed: usize) {
        if self.pattern.is_none() || self.items.len() < 2 * needed {
            return;
        }
        self.items.drain(..self.items.len() - needed);
        self.items.shrink_to(2 * needed);
    }

    fn follow_drain(&mut self, at_ns: u64, regions: &mut Vec<Region>) {
        self.drained_ns.get_or_insert(at_ns);
        let Some(pattern) = &self.pattern else { return };
        if pattern.fed {
            return;
        }
        if self.whole {
            regions.push(Region {
                end_ns: at_ns,
                step_calls: step_calls(pattern),
            });
            self.whole = false;
            self.undrained = 0;
        } else if self.in_step && pattern.uniform && self.position > 0 && !pattern.drains[self.position] {
            // A call was missed or added: with equal calls only the drain can tell.
            self.in_step = false;
            self.position = 0;
        }
    }

    fn follow_call(&mut self, item: Item, regions: &mut Vec<Region>) {
        let Some(pattern) = &self.pattern else { return };
        let at_ns = item.at_ns;
        let (token, drained_ns) = match (pattern.fed, self.drained_ns.take()) {
            (true, _) => (item.fed_token(), None),
            (false, drained_ns) => (item.token, drained_ns),
        };
        if self.whole {
            regions.push(Region {
                end_ns: at_ns,
                step_calls: step_calls(pattern),
            });
            self.whole = false;
            self.undrained += u32::from(pattern.drains[0]);
        }
        if self.in_step && token != pattern.calls[self.position] {
            self.in_step = false;
            self.position = 0;
        }
        if !self.in_step {
            if token != pattern.calls[0] || (pattern.drains[0] && drained_ns.is_none()) {
                return;
            }
            regions.push(Region {
                end_ns: drained_ns.unwrap_or(at_ns),
                step_calls: None,
            });
            self.in_step = true;
        }
        self.position += 1;
        if self.position == pattern.calls.len() {
            self.position = 0;
            self.whole = true;
            self.since_whole = 0;
        }
    }

    /// Goes through what was kept with a new pattern.
    fn follow_kept(&mut self, regions: &mut Vec<Region>) {
        (self.position, self.in_step, self.whole) = (0, false, false);
        (self.drained_ns, self.undrained) = (None, 0);
        let items: Vec<Item> = self.items.iter().copied().collect();
        for item in items {
            if item.token == DRAIN {
                self.follow_drain(item.at_ns, regions);
            } else {
                self.follow_call(item, regions);
            }
        }
    }

    fn drop_a_lost_pattern(&mut self) {
        let Some(pattern) = &self.pattern else { return };
        let lost = self.since_whole > most_astray(pattern);
        if !lost && self.undrained <= MOST_UNDRAINED {
            return;
        }
        let keep = self
            .since_whole
            .max(2 * pattern.calls.len())
            .min(self.items.len());
        self.items.drain(..self.items.len() - keep);
        self.next_search = LEAST_ITEMS.max(keep + keep / 4);
        self.pattern = None;
        self.undrained = 0;
    }

    /// Looks for a period in all that is kept, then in ever shorter recent parts: what a job does before its
    /// training loop would hide the loop for long.
    fn search(&self) -> Option<Pattern> {
        let items: Vec<Item> = self.items.iter().copied().collect();
        let mut part = items.as_slice();
        while part.len() >= LEAST_ITEMS {
            if let Some(pattern) = self.search_part(part) {
                return Some(pattern);
            }
            part = &part[part.len() / 2..];
        }
        None
    }

    fn search_part(&self, items: &[Item]) -> Option<Pattern> {
        let drained = self.search_drained(items);
        let fine = self.search_calls(items, true);
        match (drained, fine) {
            (Some(drained), Some(fine)) => {
                let (coarse, calls) = (drained.calls.len(), fine.calls.len());
                Some(if coarse > calls && coarse.is_multiple_of(calls) {
                    fine
                } else {
                    drained
                })
            }
            (Some(drained), None) => Some(drained),
            (None, fine) => {
                let drains =
                    |items: &mut dyn Iterator<Item = &Item>| items.filter(|item| item.token == DRAIN).count();
                let seldom = drains(&mut self.items.iter()) >= 3 && drains(&mut items.iter()) == 0;
                // A part of a step can have a period of its own: where drains are usual, one must be in it.
                if seldom {
                    None
                } else {
                    self.search_calls(items, false).or(fine)
                }
            }
        }
    }

    /// The period of calls and drains.
    fn search_drained(&self, items: &[Item]) -> Option<Pattern> {
        let tokens: Vec<u64> = items.iter().map(|item| item.token).collect();
        let period = find_period(&tokens)?;
        let pattern = repeated(&tokens, period.lag)?;
        let mixed = pattern.contains(&DRAIN) && pattern.iter().any(|token| *token != DRAIN);
        mixed.then(|| Pattern::new(&smallest_rotation(pattern)))
    }

    /// The period of the calls alone, told apart by feeding or not.
    fn search_calls(&self, items: &[Item], fed: bool) -> Option<Pattern> {
        let calls: Vec<Item> = items.iter().copied().filter(|item| item.token != DRAIN).collect();
        let token = |item: &Item| if fed { item.fed_token() } else { item.token };
        let tokens: Vec<u64> = calls.iter().map(token).collect();
        let times: Vec<u64> = calls.iter().map(|item| item.at_ns).collect();
        let period = find_period_timed(&tokens, &times)?;
        if self.calls == Calls::Collectives && !period.is_conclusive() {
            return None;
        }
        let lag = period.lag;
        // What feeds a step comes before its first call.
        let phase = match calls.iter().rposition(|item| fed && item.fed) {
            Some(at) => at % lag,
            None => period.phase,
        };
        (0..tokens.len())
            .rev()
            .filter(|at| at % lag == phase && at + 2 * lag <= tokens.len())
            .map(|at| (&tokens[at..at + lag], &tokens[at + lag..at + 2 * lag]))
            .find(|(pattern, next)| pattern == next)
            .map(|(pattern, _)| Pattern {
                fed,
                ..Pattern::new(pattern)
            })
    }
}

impl Pattern {
    /// From calls and drains; a drain at the end belongs before the first call.
    fn new(tokens: &[u64]) -> Self {
        let (mut calls, mut drains) = (Vec::new(), Vec::new());
        let mut drained = tokens.last() == Some(&DRAIN);
        for token in tokens {
            if *token == DRAIN {
                drained = true;
            } else {
                calls.push(*token);
                drains.push(std::mem::take(&mut drained));
            }
        }
        let uniform = calls.iter().all(|call| Some(call) == calls.first());
        Self {
            calls,
            drains,
            uniform,
            fed: false,
        }
    }
}

fn step_calls(pattern: &Pattern) -> Option<u32> {
    Some(u32::try_from(pattern.calls.len()).unwrap_or(u32::MAX))
}

/// The latest stretch of `lag` tokens that equals the one before it.
fn repeated(tokens: &[u64], lag: usize) -> Option<&[u64]> {
    (2 * lag..=tokens.len())
        .rev()
        .find(|end| tokens[end - lag..*end] == tokens[end - 2 * lag..end - lag])
        .map(|end| &tokens[end - lag..end])
}

/// Of the rotations that end with a drain, the smallest.
fn smallest_rotation(pattern: &[u64]) -> Vec<u64> {
    let rotated = |start: usize| pattern[start..].iter().chain(&pattern[..start]).copied();
    (0..pattern.len())
        .filter(|start| rotated(*start).last() == Some(DRAIN))
        .min_by(|a, b| rotated(*a).cmp(rotated(*b)))
        .map_or_else(|| pattern.to_vec(), |start| rotated(start).collect())
}
