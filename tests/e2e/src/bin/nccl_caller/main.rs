//! Calls a real NCCL with arguments that a test can recognise.
//!
//! `nccl_caller LIBRARY` prints `ready`, then obeys one word of input per step and answers with one line: the addresses and
//! numbers that the probes must find. `nccl_caller LIBRARY serve|send ADDRESS COUNT SIZE` moves messages through the
//! library's InfiniBand transport instead and says how much that was. There is no GPU, so calls fail; none may crash, but
//! the one that is meant to.

mod calls;
mod image;
mod made_up_gpu;
mod net;
mod plugin;
mod waits;

use std::error::Error;
use std::ffi::{c_int, c_void};
use std::fs::File;
use std::io::{self, BufRead as _, Write as _};
use std::os::fd::AsFd as _;

use image::Image;

/// `ncclUniqueId`
#[derive(Clone, Copy)]
#[repr(C)]
struct UniqueId([u8; 128]);

type Comm = *mut c_void;
type Stream = *mut c_void;
type Buffer = *mut c_void;
type Config = *mut c_void;
type Outcome = Result<String, Box<dyn Error>>;

/// Larger than any version's `ncclComm`, in words.
const COMM_WORDS: usize = 1 << 19;

fn main() -> Result<(), Box<dyn Error>> {
    let path = std::env::args_os().nth(1).ok_or("the library is missing")?;
    // The library prints to standard output, which is for answers.
    let mut answers = File::from(io::stdout().as_fd().try_clone_to_owned()?);
    // SAFETY: both descriptors are open, and standard output is replaced as a whole.
    if unsafe { libc::dup2(libc::STDERR_FILENO, libc::STDOUT_FILENO) } < 0 {
        return Err(io::Error::last_os_error().into());
    }
    let image = Image::load(path.as_ref())?;
    let mut say = |text: &str| writeln!(answers, "{text}");
    let words: Vec<String> = std::env::args().skip(2).collect();
    if !words.is_empty() {
        return Ok(say(&net::run(&image, &words)?)?);
    }
    say("ready")?;
    let mut line = String::new();
    while io::stdin().lock().read_line(&mut line)? != 0 {
        let answer = match line.trim() {
            "collectives" => calls::collectives(&image),
            "communicators" => made_up_gpu::communicators(&image),
            "waits" => waits::walk(&image),
            "mask" => plugin::mask(&image),
            "control" => plugin::control(&image),
            "crash" => calls::crash(&image),
            word => Err(format!("no such step: {word}").into()),
        };
        say(&answer?)?;
        line.clear();
    }
    Ok(())
}

/// A communicator of zeros, with `first` as its first word: readable, and refused by every call for its wrong magic.
fn refused_communicator(first: u64) -> &'static mut [u64] {
    let words = vec![0u64; COMM_WORDS].leak();
    words[0] = first;
    words
}

/// The results of calls, with their names.
fn told(results: &[(&str, c_int)]) -> String {
    results
        .iter()
        .map(|(name, result)| format!("{name}={result}"))
        .collect::<Vec<_>>()
        .join(" ")
}
