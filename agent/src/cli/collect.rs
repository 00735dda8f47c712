//! `stallscope collect`: exit 0 on a clean stop, 2 when it cannot start.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use stallscope_collector::board::BoardLimits;
use stallscope_collector::tls::IdentityFiles;
use stallscope_collector::{Collector, CollectorConfig, DEFAULT_MAX_BYTES, Limits};
use tokio::signal::unix::{SignalKind, signal};

/// Arguments of `stallscope collect`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// UDP address to listen on
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:4433")]
    listen: SocketAddr,
    /// Directory of what was received, made when missing
    #[arg(long, value_name = "DIR", default_value = "/var/lib/stallscope/collector")]
    store: PathBuf,
    /// Bytes the store may take; the oldest data goes first
    #[arg(long, value_name = "BYTES", default_value_t = DEFAULT_MAX_BYTES)]
    max_bytes: u64,
    /// Certificates that sign those of agents and of report readers (PEM)
    #[arg(long, value_name = "FILE")]
    ca: PathBuf,
    /// This collector's certificate (PEM)
    #[arg(long, value_name = "FILE")]
    cert: PathBuf,
    /// This collector's private key (PEM)
    #[arg(long, value_name = "FILE")]
    key: PathBuf,
    /// Take agents whose certificate does not name their node: for fleets that share one certificate. Whoever holds its key
    /// can then speak for every node
    #[arg(long)]
    any_name: bool,
}

pub(super) fn run(args: Args) -> ExitCode {
    let Args {
        listen,
        store,
        max_bytes,
        ca,
        cert,
        key,
        any_name,
    } = args;
    let config = CollectorConfig {
        listen,
        store,
        max_bytes,
        identity: IdentityFiles { ca, cert, key },
        any_name,
        board: BoardLimits::default(),
        limits: Limits::default(),
    };
    let runtime = match tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return ExitCode::from(2);
        }
    };
    match runtime.block_on(collect(config)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("the collector did not start: {error}; agents keep their data until one is there");
            ExitCode::from(2)
        }
    }
}

async fn collect(config: CollectorConfig) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let store = config.store.clone();
    let collector = Collector::start(config).await?;
    tracing::info!(address = %collector.local_addr()?, store = %store.display(), "collector listens");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    let stats = collector.stats();
    collector.stop().await;
    tracing::info!(?stats, "collector stopped; everything acknowledged is on disk");
    Ok(())
}
