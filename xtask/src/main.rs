//! `cargo xtask`: setup, builds, demo, scenarios, tests, packages.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use xtask::paths::Paths;
use xtask::{bench, bpf, ci, cost, demo, package, scenario, setup, testing, truth, vm};

/// Tasks around stallscope
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what build and tests need
    Setup {
        /// Only what building and running need, not the tests
        #[arg(long)]
        run_only: bool,
    },
    /// Build the eBPF programs into one object
    BuildBpf {
        /// With the programs' debug output
        #[arg(long)]
        debug: bool,
    },
    /// Let the kernel verify the eBPF programs and compare instruction counts with the checked-in table
    BpfStats {
        /// Renew the table
        #[arg(long)]
        write: bool,
    },
    /// Run a job on virtual nodes with a fault, and print the report that names it
    Demo(demo::Args),
    /// Run a scenario file and print truth beside verdict
    Scenario(scenario::Args),
    /// Measure what watching costs the job's steps
    Cost(cost::Args),
    /// Measure how right the verdicts are and write docs/truth.md
    Truth(truth::Args),
    /// Measure how fast the product works off what it is given
    Bench(bench::Args),
    /// Watch two virtual machines with a stock kernel, RDMA between them and PCIe errors in them
    Vm(vm::Args),
    /// Run every test, privileged ones included
    Test(testing::Args),
    /// Run the gates, then every test
    Ci,
    /// Build the .deb and the .rpm
    Package {
        /// Also install, run and remove the .deb in a fresh Debian root
        #[arg(long)]
        test: bool,
    },
}

fn main() -> ExitCode {
    xtask::lab::interrupt::catch();
    match run(Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    let paths = Paths::find()?;
    match task {
        Task::Setup { run_only } => {
            let scope = if run_only {
                setup::Scope::Run
            } else {
                setup::Scope::All
            };
            setup::ensure(&paths, scope)?;
            setup::ensure_lab()
        }
        Task::BuildBpf { debug } => bpf::build(&paths, debug).map(drop),
        Task::BpfStats { write } => bpf::verifier::gate(&paths, write),
        Task::Demo(args) => demo::run(&paths, &args),
        Task::Scenario(args) => scenario::run(&paths, &args),
        Task::Cost(args) => cost::run(&paths, &args),
        Task::Truth(args) => truth::run(&paths, &args),
        Task::Bench(args) => bench::run(&paths, &args),
        Task::Vm(args) => vm::run(&paths, &args),
        Task::Test(args) => testing::run(&paths, args),
        Task::Ci => ci::run(&paths),
        Task::Package { test } => make_packages(&paths, test),
    }
}

fn make_packages(paths: &Paths, test: bool) -> Result<()> {
    setup::ensure(paths, setup::Scope::All)?;
    let packages = package::build(paths)?;
    if test {
        package::test(paths, &packages)?;
    }
    println!("{}\n{}", packages.deb.display(), packages.rpm.display());
    Ok(())
}
