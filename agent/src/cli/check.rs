//! `stallscope check`: one line for schedulers. Exit 0 fit, 1 degraded, 2 unfit, 3 agent unreachable.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use crate::control::{Answer, Fitness, Request, client};

/// A running agent answers in a fraction of this; a scheduler must not hang on one that does not.
const TIMEOUT: Duration = Duration::from_secs(1);
const UNREACHABLE: u8 = 3;

/// Arguments of `stallscope check`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// Only this GPU, by its index on the node
    #[arg(long, value_name = "INDEX")]
    gpu: Option<u32>,
    #[command(flatten)]
    agent: super::socket::AgentArgs,
}

pub(super) fn run(args: &Args) -> ExitCode {
    let (line, code) = match answer(args) {
        Ok(Answer::Check(check)) => {
            let node = if check.node.is_empty() {
                String::new()
            } else {
                format!("{}: ", check.node)
            };
            (
                format!("{}: {node}{}", check.fitness.name(), check.reasons.join("; ")),
                code(check.fitness),
            )
        }
        Ok(Answer::Failed { why }) => (format!("unreachable: {why}"), UNREACHABLE),
        Ok(Answer::Report { .. } | Answer::NothingRecorded { .. } | Answer::Status(_)) => (
            "unreachable: the agent answered something else; are both of the same version?".to_owned(),
            UNREACHABLE,
        ),
        Err(why) => (format!("unreachable: {why}"), UNREACHABLE),
    };
    // One line, whatever a name or an error holds; and a closed pipe must not change the answer.
    let line: String = line
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let _ = writeln!(std::io::stdout(), "{line}");
    ExitCode::from(code)
}

fn answer(args: &Args) -> Result<Answer, String> {
    let socket = args.agent.socket(args.agent.config()?);
    client::ask(&socket, &Request::Check { gpu: args.gpu }, TIMEOUT).map_err(|error| error.to_string())
}

const fn code(fitness: Fitness) -> u8 {
    match fitness {
        Fitness::Fit => 0,
        Fitness::Degraded => 1,
        Fitness::Unfit => 2,
    }
}
