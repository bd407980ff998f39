//! The thread pool every kernel runs on.
//!
//! In [`Pool::run`] every thread has a share of the task numbers, one after another, so that what it reads goes on where its last
//! task ended and what it asked for ahead is its own; who is done takes half of what another has left. The caller takes part.
//! After a run workers spin for some microseconds, then offer their core to others until 200 µs have passed, then park: a chain of small kernels
//! waits for no core to wake up (on a virtual machine that takes longer than a product of one token), and an idle pool
//! costs nothing.
//! A worker that wakes late is never waited for: a run ends when all its tasks are done.
//!
//! The pool carries the [`Level`] its kernels run at, and one scratch buffer a worker. It knows nothing of NUMA and
//! does not pin threads.

use std::any::Any;
use std::cell::{Cell, UnsafeCell};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::*};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{JoinHandle, Thread};
use std::time::{Duration, Instant};

use crate::Element;
use crate::dispatch::Level;

mod buffer;
mod share;

use buffer::Scratch;
pub use buffer::SharedMut;
use share::Share;

/// How long a thread without work spins.
const SPIN: Duration = Duration::from_micros(20);
/// After how long it parks.
const PARK: Duration = Duration::from_micros(200);

/// Passes a moment of a wait that began at `start`; false when it is time to park.
fn pause(start: Instant) -> bool {
    let waited = start.elapsed();
    if waited < SPIN {
        std::hint::spin_loop();
    } else if waited < PARK {
        std::thread::yield_now();
    }
    waited < PARK
}

/// A fixed set of threads that run numbered tasks.
///
/// Several threads may share one pool: their runs take turns.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// The caller's worker; its lock is the turn to run.
    caller: Mutex<Worker>,
    /// Scratch that all workers see, see [`Pool::run_phases`].
    common: Mutex<Scratch>,
    level: Level,
    dry: bool,
}

impl Pool {
    /// A pool of `threads` threads, the caller of [`Pool::run`] being one of them, at [`Level::current`].
    ///
    /// # Panics
    /// When `threads` is 0, or `WINDLASS_KERNELS` asks for what this CPU cannot do (see [`Level::from_env`]).
    #[track_caller]
    pub fn new(threads: usize) -> Pool {
        Pool::with_level(threads, Level::current())
    }

    /// A pool whose kernels run at `level`: how tests compare levels in one process.
    ///
    /// # Panics
    /// When `threads` is 0 or this CPU does not support `level`.
    #[track_caller]
    pub fn with_level(threads: usize, level: Level) -> Pool {
        assert!(
            level.is_supported(),
            "kernel level {level} is not supported by this CPU"
        );
        // SAFETY: the level is supported.
        unsafe { Pool::with_level_unchecked(threads, level) }
    }

    /// As [`Pool::with_level`], without asking the CPU: for tests that emulate missing instructions.
    ///
    /// # Safety
    /// Every instruction of `level` can be executed or is emulated.
    #[track_caller]
    pub unsafe fn with_level_unchecked(threads: usize, level: Level) -> Pool {
        assert!(
            threads > 0,
            "a pool needs at least one thread, got threads = 0"
        );
        let shared = Arc::new(Shared::new(threads));
        let workers = (1..threads)
            .map(|index| {
                let shared = Arc::clone(&shared);
                let parked = Arc::new(AtomicBool::new(false));
                let seen = Arc::clone(&parked);
                let handle = std::thread::Builder::new()
                    .name(format!("windlass-{index}"))
                    .spawn({
                        let shared = Arc::clone(&shared);
                        move || shared.work(Worker::new(index), &seen)
                    })
                    .expect("the system refused to start a thread");
                lock(&shared.sleepers).push(Sleeper {
                    parked,
                    thread: handle.thread().clone(),
                });
                handle
            })
            .collect();
        let caller = Mutex::new(Worker::new(0));
        Pool {
            shared,
            workers,
            caller,
            common: Mutex::new(Scratch::new()),
            level,
            dry: false,
        }
    }

    /// A pool that executes no task: a step is replayed on it to plan memory, without arithmetic.
    pub fn dry() -> Pool {
        let mut pool = Pool::with_level(1, Level::Scalar);
        pool.dry = true;
        pool
    }

    /// Whether this pool executes no task.
    pub fn is_dry(&self) -> bool {
        self.dry
    }

    /// Threads that take part in a run, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// The level that kernels on this pool run at.
    pub fn level(&self) -> Level {
        self.level
    }

    /// Calls `task(number, worker)` once for every number in `0..tasks`, in any order, on all threads; returns when
    /// all are done.
    ///
    /// Kernels keep the size of a task independent of the number of threads, so that results are too.
    ///
    /// # Panics
    /// With the first panic of a task (tasks not yet begun are dropped, but for those that a thread is about to take from
    /// another), when called from inside a task of the same pool, or for 2^32 tasks and more.
    #[track_caller]
    pub fn run<F: Fn(usize, &mut Worker) + Sync>(&self, tasks: usize, task: F) {
        if self.dry || tasks == 0 {
            return;
        }
        self.assert_not_nested();
        let mut caller = lock(&self.caller);
        self.shared.run(tasks, &task, &mut caller);
    }

    /// Runs several sets of tasks one after another over one common scratch buffer of `len` elements, 64-byte aligned
    /// and with unspecified contents at the start: `phases` calls [`Phases::run`] as often as it needs to.
    ///
    /// # Panics
    /// As [`Pool::run`].
    #[track_caller]
    pub fn run_phases<E: Element>(
        &self,
        len: usize,
        phases: impl FnOnce(&Phases<'_>, SharedMut<'_, E>),
    ) {
        if self.dry {
            return;
        }
        self.assert_not_nested();
        let caller = lock(&self.caller);
        let mut common = lock(&self.common);
        let phase = Phases {
            shared: &self.shared,
            caller: std::cell::RefCell::new(caller),
        };
        phases(&phase, SharedMut::new(common.slices::<E, E>(len, 0).0));
    }

    #[track_caller]
    fn assert_not_nested(&self) {
        let here = Arc::as_ptr(&self.shared);
        assert!(
            RUNNING.get() != here,
            "nested Pool::run: a task may not start a run on the pool it runs on"
        );
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        self.shared.wake(usize::MAX);
        for worker in self.workers.drain(..) {
            // A worker catches the panics of tasks, so joining cannot fail; dropping must not panic anyhow.
            let _ = worker.join();
        }
    }
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Pool {{ threads: {}, level: {}, dry: {} }}",
            self.threads(),
            self.level,
            self.dry
        )
    }
}

/// The turn of [`Pool::run_phases`].
pub struct Phases<'a> {
    shared: &'a Shared,
    caller: std::cell::RefCell<std::sync::MutexGuard<'a, Worker>>,
}

impl Phases<'_> {
    /// As [`Pool::run`]; what tasks of an earlier phase wrote is visible.
    #[track_caller]
    pub fn run<F: Fn(usize, &mut Worker) + Sync>(&self, tasks: usize, task: F) {
        if tasks > 0 {
            self.shared.run(tasks, &task, &mut self.caller.borrow_mut());
        }
    }
}

/// What a task knows of the thread it runs on.
pub struct Worker {
    index: usize,
    scratch: Scratch,
}

impl Worker {
    fn new(index: usize) -> Worker {
        Worker {
            index,
            scratch: Scratch::new(),
        }
    }

    /// The thread's number in `0..pool.threads()`. No result may depend on it.
    pub fn index(&self) -> usize {
        self.index
    }

    /// A buffer of `len` elements owned by this thread, 64-byte aligned, with unspecified contents.
    pub fn scratch<E: Element>(&mut self, len: usize) -> &mut [E] {
        self.scratch.slices::<E, E>(len, 0).0
    }

    /// Two disjoint buffers as [`Worker::scratch`].
    pub fn scratch2<E: Element, F: Element>(
        &mut self,
        len: usize,
        len2: usize,
    ) -> (&mut [E], &mut [F]) {
        self.scratch.slices(len, len2)
    }
}

thread_local! {
    /// The pool whose task this thread is running.
    static RUNNING: Cell<*const Shared> = const { Cell::new(std::ptr::null()) };
}

type Task<'a> = &'a (dyn Fn(usize, &mut Worker) + Sync);

/// The job being run: written by the caller while the job is closed, read by workers that joined it.
struct Job {
    task: Task<'static>,
    caller: Thread,
}

struct Sleeper {
    parked: Arc<AtomicBool>,
    thread: Thread,
}

/// `state`: number of the job in the upper 32 bits, [`OPEN`] while it can be joined, workers inside it below.
struct Shared {
    state: AtomicU64,
    /// Of each thread.
    shares: Box<[Share]>,
    job: UnsafeCell<Option<Job>>,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    sleepers: Mutex<Vec<Sleeper>>,
    stop: AtomicBool,
}

const OPEN: u64 = 1 << 31;
const INSIDE: u64 = OPEN - 1;

// SAFETY: `job` is written only by the one caller holding `Pool::caller`, while no worker is inside (the job is closed
// and INSIDE is 0), and read only by workers inside; `state` orders both.
unsafe impl Sync for Shared {}
// SAFETY: as above; everything in it may be dropped on any thread.
unsafe impl Send for Shared {}

impl Shared {
    fn new(threads: usize) -> Shared {
        Shared {
            state: AtomicU64::new(0),
            shares: (0..threads).map(|_| Share::default()).collect(),
            job: UnsafeCell::new(None),
            panic: Mutex::default(),
            sleepers: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    /// Caller's side. Exclusive by the lock on `Pool::caller`.
    fn run(&self, tasks: usize, task: Task<'_>, worker: &mut Worker) {
        assert!(u32::try_from(tasks).is_ok(), "{tasks} tasks in one run");
        let threads = self.shares.len();
        // Nobody is inside who could see this.
        for (index, share) in self.shares.iter().enumerate() {
            share.set(tasks * index / threads..tasks * (index + 1) / threads);
        }
        if tasks > 1 {
            // SAFETY: only the lifetime changes; no worker touches the task after `close` returned.
            let task = unsafe { std::mem::transmute::<Task<'_>, Task<'static>>(task) };
            // SAFETY: the job is closed and no worker is inside.
            unsafe {
                *self.job.get() = Some(Job {
                    task,
                    caller: std::thread::current(),
                })
            };
            let number = (self.state.load(Relaxed) >> 32).wrapping_add(1);
            self.state.store(number << 32 | OPEN, SeqCst);
            self.wake(tasks - 1);
            self.take_tasks(task, worker);
            self.close();
        } else {
            self.take_tasks(task, worker);
        }
        let panic = lock(&self.panic).take();
        if let Some(payload) = panic {
            resume_unwind(payload);
        }
    }

    /// Ends the job: nobody can join, and everybody inside has left.
    fn close(&self) {
        let mut inside = self.state.fetch_and(!OPEN, SeqCst) & INSIDE;
        let start = Instant::now();
        while inside != 0 {
            if !pause(start) {
                // The worker that leaves last unparks us; a stray token only costs a turn of this loop.
                std::thread::park();
            }
            inside = self.state.load(SeqCst) & INSIDE;
        }
    }

    fn take_tasks(&self, task: Task<'_>, worker: &mut Worker) {
        let before = RUNNING.replace(self);
        let result = catch_unwind(AssertUnwindSafe(|| {
            while let Some(number) = self.next(worker.index) {
                task(number, worker);
            }
        }));
        RUNNING.set(before);
        if let Err(payload) = result {
            self.shares.iter().for_each(|share| share.set(0..0));
            lock(&self.panic).get_or_insert(payload);
        }
    }

    /// The next task of a thread: of its own share, or else of what it takes from another.
    fn next(&self, index: usize) -> Option<usize> {
        let own = &self.shares[index];
        own.first().or_else(|| {
            let (before, after) = self.shares.split_at(index);
            let taken = after[1..].iter().chain(before).find_map(Share::half)?;
            // It was empty, so nobody takes of it; who panics empties all, and then this one goes on with what it took.
            own.set(taken.start + 1..taken.end);
            Some(taken.start)
        })
    }

    /// Worker's side: joins every job it sees open, until the pool is dropped.
    fn work(&self, mut worker: Worker, parked: &AtomicBool) {
        let mut last = 0;
        while self.wait_for_job(last, parked) {
            let state = self.state.load(SeqCst);
            if state & OPEN == 0 || state >> 32 == last {
                continue;
            }
            if self
                .state
                .compare_exchange_weak(state, state + 1, SeqCst, Relaxed)
                .is_err()
            {
                continue;
            }
            last = state >> 32;
            // SAFETY: this worker is inside an open job, so it was written and is not replaced until we leave.
            let job = unsafe { (*self.job.get()).as_ref() }.expect("an open job is set");
            let caller = job.caller.clone();
            self.take_tasks(job.task, &mut worker);
            let state = self.state.fetch_sub(1, SeqCst);
            if state & (OPEN | INSIDE) == 1 {
                caller.unpark();
            }
        }
    }

    /// Spins, then parks, until a job other than `last` is open (true) or the pool is dropped (false).
    fn wait_for_job(&self, last: u64, parked: &AtomicBool) -> bool {
        let ready = || {
            let state = self.state.load(SeqCst);
            self.stop.load(SeqCst) || (state & OPEN != 0 && state >> 32 != last)
        };
        let start = Instant::now();
        while !ready() {
            if pause(start) {
                continue;
            }
            parked.store(true, SeqCst);
            // Whoever publishes a job afterwards sees `parked`; whoever did before is seen here.
            if !ready() {
                std::thread::park();
            }
            parked.store(false, SeqCst);
        }
        !self.stop.load(SeqCst)
    }

    /// Wakes at most `count` parked workers.
    fn wake(&self, count: usize) {
        for sleeper in lock(&self.sleepers).iter().take(count) {
            if sleeper.parked.swap(false, SeqCst) {
                sleeper.thread.unpark();
            }
        }
    }
}

/// A poisoned lock only means that a task panicked, which the pool handles itself.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicUsize;

    #[test]
    fn every_task_runs_once() {
        for threads in 1..=4 {
            let pool = Pool::new(threads);
            for round in 0..300 {
                for tasks in [0, 1, 2, 3, 7, 64, 257] {
                    let counts: Vec<AtomicUsize> =
                        (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    pool.run(tasks, |task, worker| {
                        assert!(worker.index() < threads);
                        counts[task].fetch_add(1, Relaxed);
                    });
                    assert!(
                        counts.iter().all(|c| c.load(Relaxed) == 1),
                        "{threads} threads, {tasks} tasks"
                    );
                }
                if round % 100 == 99 {
                    std::thread::sleep(Duration::from_millis(1)); // let the workers park
                }
            }
        }
    }

    #[test]
    fn panics_reach_the_caller_and_the_pool_survives() {
        let pool = Pool::new(3);
        for bad in 0..20 {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(20, |task, _| assert!(task != bad, "task {bad} fails"));
            }));
            let message = *result.unwrap_err().downcast::<String>().unwrap();
            assert_eq!(message, format!("task {bad} fails"));
            let sum = AtomicUsize::new(0);
            pool.run(10, |task, _| {
                sum.fetch_add(task, Relaxed);
            });
            assert_eq!(sum.load(Relaxed), 45);
        }
    }

    #[test]
    fn nested_runs_are_refused_and_other_pools_are_not() {
        let (pool, other) = (Pool::new(2), Pool::new(2));
        let ran = AtomicUsize::new(0);
        pool.run(4, |_, _| {
            other.run(4, |_, _| {
                ran.fetch_add(1, Relaxed);
            })
        });
        assert_eq!(ran.load(Relaxed), 16);
        for tasks in [1, 4] {
            let result = catch_unwind(AssertUnwindSafe(|| {
                pool.run(tasks, |_, _| pool.run(1, |_, _| ()))
            }));
            let payload = result.unwrap_err();
            assert!(
                payload
                    .downcast_ref::<&str>()
                    .unwrap()
                    .contains("nested Pool::run")
            );
        }
    }

    #[test]
    fn threads_take_turns() {
        let pool = Pool::new(2);
        let sum = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    (0..200).for_each(|_| {
                        pool.run(8, |task, _| {
                            sum.fetch_add(task, Relaxed);
                        })
                    })
                });
            }
        });
        assert_eq!(sum.load(Relaxed), 4 * 200 * 28);
    }

    #[test]
    fn scratch_and_phases() {
        let pool = Pool::new(3);
        pool.run(64, |task, worker| {
            let (a, b) = worker.scratch2::<f64, half::bf16>(task * 3, task);
            assert_eq!((a.as_ptr() as usize % 64, b.as_ptr() as usize % 64), (0, 0));
            a.fill(task as f64);
            b.fill(half::bf16::ONE);
            assert!(a.iter().all(|&x| x == task as f64), "parts are disjoint");
        });
        let mut out = vec![0f32; 100];
        let view = SharedMut::new(&mut out);
        pool.run_phases::<f32>(100, |phases, common| {
            // SAFETY: one element a task.
            phases.run(100, |task, _| unsafe {
                common.slice(task, 1)[0] = task as f32
            });
            // SAFETY: the common buffer is only read now; `out` is written one element a task.
            phases.run(100, |task, _| unsafe {
                view.slice(task, 1)[0] = common.slice(99 - task, 1)[0]
            });
        });
        assert!(out.iter().enumerate().all(|(i, &x)| x == (99 - i) as f32));
    }

    #[test]
    fn a_dry_pool_runs_nothing() {
        let pool = Pool::dry();
        pool.run(3, |_, _| panic!("a task ran"));
        pool.run_phases::<f32>(1, |_, _| panic!("a phase ran"));
    }
}
