//! The stand-ins export what the real libraries export, under names by which programs find them.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use object::{Object, ObjectSymbol};

mod built;

fn exported(library: &Path) -> Result<Vec<String>> {
    let bytes = std::fs::read(library).with_context(|| format!("failed to read {}", library.display()))?;
    let file = object::File::parse(&*bytes)?;
    let defined = file.dynamic_symbols().filter(|symbol| symbol.is_definition());
    Ok(defined
        .filter_map(|symbol| symbol.name().ok().map(str::to_owned))
        .collect())
}

/// Public names of NCCL 2.27.5, as `nm -D` lists them for the library of the Python wheel.
const REAL_NCCL: &str = include_str!("../nccl/symbols-2.27.5.txt");

#[test]
fn nccl_exports_what_the_real_one_does_and_no_more() -> Result<()> {
    let real: Vec<&str> = REAL_NCCL.lines().collect();
    let ours = exported(&built::folder()?.join("libvirtual_nccl.so"))?;
    let strange: Vec<&String> = ours
        .iter()
        .filter(|name| !real.contains(&name.as_str()))
        .collect();
    ensure!(strange.is_empty(), "not in the real library: {strange:?}");
    let missing: Vec<&&str> = real
        .iter()
        .filter(|name| !ours.iter().any(|own| own == *name))
        .collect();
    ensure!(missing.is_empty(), "only in the real library: {missing:?}");
    Ok(())
}

/// Where NCCL 2.27.5 tells what its proxy's steps wait for: local symbols, so no program can take them for its own.
const HOOKS: [&str; 2] = [
    "_Z37ncclProfilerRecordProxyStepEventStateiP13ncclProxyArgsi24ncclProfilerEventState_t",
    "_Z30ncclProfilerStopProxyStepEventiP13ncclProxyArgsi",
];

#[test]
fn nccl_names_its_hooks_among_its_local_symbols() -> Result<()> {
    let bytes = std::fs::read(built::folder()?.join("libvirtual_nccl.so"))?;
    let file = object::File::parse(&*bytes)?;
    for name in HOOKS {
        let found: Vec<_> = file
            .symbols()
            .filter(|symbol| symbol.name() == Ok(name))
            .collect();
        let [hook] = &found[..] else {
            anyhow::bail!("{} symbols of the name {name}", found.len());
        };
        ensure!(
            hook.is_definition() && hook.is_local() && hook.kind() == object::SymbolKind::Text,
            "{hook:?}"
        );
    }
    Ok(())
}

#[test]
fn nccls_second_names_reach_the_first_with_every_argument() -> Result<()> {
    // SAFETY: the stand-in runs nothing when it is loaded.
    let library = unsafe { libloading::Library::new(built::folder()?.join("libvirtual_nccl.so"))? };
    type GetVersion = unsafe extern "C" fn(*mut i32) -> i32;
    type Reduce = unsafe extern "C" fn(usize, usize, usize, i32, i32, i32, usize, usize) -> i32;
    // SAFETY: the signatures are those of nccl.h; no communicator has address 3, which is refused before any use.
    unsafe {
        for name in [&b"ncclGetVersion\0"[..], b"pncclGetVersion\0"] {
            let mut version = 0;
            ensure!(library.get::<GetVersion>(name)?(&raw mut version) == 0 && version == 22_705);
        }
        let status = library.get::<Reduce>(b"pncclReduce\0")?(1, 2, 4, 7, 0, 0, 3, 0);
        ensure!(
            status == 4,
            "an unknown communicator is an invalid argument, not {status}"
        );
    }
    Ok(())
}

#[test]
fn the_list_of_nccls_names_is_the_real_librarys() -> Result<()> {
    let library = std::env::var_os("STALLSCOPE_REAL_NCCL")
        .map(PathBuf::from)
        .filter(|library| library.exists());
    let Some(library) = library else {
        println!(
            "skipped: the_list_of_nccls_names_is_the_real_librarys: STALLSCOPE_REAL_NCCL names no library"
        );
        return Ok(());
    };
    let mut real = exported(&library)?;
    real.retain(|name| name.starts_with("nccl") || name.starts_with("pnccl"));
    real.retain(|name| {
        name.trim_start_matches("pnccl")
            .trim_start_matches("nccl")
            .starts_with(char::is_uppercase)
    });
    real.sort();
    let listed: Vec<&str> = REAL_NCCL.lines().collect();
    ensure!(real == listed, "the list differs from {}", library.display());
    Ok(())
}

#[test]
fn cuda_and_nvml_export_only_names_of_their_own_kind() -> Result<()> {
    for (file, prefixes) in [
        ("libvirtual_cuda.so", &["cu", "virtualGpu"][..]),
        ("libvirtual_nvml.so", &["nvml"][..]),
    ] {
        for name in exported(&built::folder()?.join(file))? {
            ensure!(
                prefixes.iter().any(|prefix| name.starts_with(prefix)),
                "{file} exports {name}"
            );
        }
    }
    Ok(())
}

#[test]
fn libraries_carry_the_names_programs_ask_for() -> Result<()> {
    for (file, name) in [
        ("libvirtual_cuda.so", "libcuda.so.1"),
        ("libvirtual_nccl.so", "libnccl.so.2"),
        ("libvirtual_nvml.so", "libnvidia-ml.so.1"),
    ] {
        let bytes = std::fs::read(built::folder()?.join(file))?;
        let wanted = [name.as_bytes(), b"\0"].concat();
        ensure!(
            bytes.windows(wanted.len()).any(|window| window == wanted),
            "{file} does not name itself {name}"
        );
    }
    Ok(())
}

#[test]
fn a_program_says_what_it_lacks() -> Result<()> {
    let output = Command::new(built::vnode())
        .args(["run", "--scenario", "/nonexistent.toml", "--dir"])
        .arg(std::env::temp_dir())
        .output()?;
    ensure!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    ensure!(said.contains("failed to read /nonexistent.toml"), "{said}");
    Ok(())
}
