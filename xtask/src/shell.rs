//! Running other programs. Their standard output goes to standard error, so that a task's own result is alone on
//! standard output.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// Runs a command to its end.
///
/// # Errors
/// It could not start or did not exit with 0.
pub fn run(command: &mut Command) -> Result<()> {
    let status = command
        .stdout(Stdio::from(std::io::stderr()))
        .status()
        .with_context(|| format!("failed to start {}", line(command)))?;
    if !status.success() {
        bail!("{} failed with {status}", line(command));
    }
    Ok(())
}

/// Runs a command to its end and hands back its standard output; its standard error passes through.
///
/// # Errors
/// It could not start or did not exit with 0.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stderr(Stdio::inherit())
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("failed to start {}", line(command)))?;
    if !output.status.success() {
        bail!("{} failed with {}", line(command), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command quietly and says whether it exited with 0.
#[must_use]
pub fn succeeds(command: &mut Command) -> bool {
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// The command as a person would type it.
#[must_use]
pub fn line(command: &Command) -> String {
    let mut words = vec![quoted(command.get_program())];
    words.extend(command.get_args().map(quoted));
    words.join(" ")
}

fn quoted(word: &std::ffi::OsStr) -> String {
    let word = word.to_string_lossy();
    if word.is_empty() || word.contains(|c: char| c.is_whitespace() || "'\"$&|;<>*?()".contains(c)) {
        format!("'{}'", word.replace('\'', r"'\''"))
    } else {
        word.into_owned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_command_is_named_as_typed() {
        let error = run(Command::new("sh").args(["-c", "exit 3"]))
            .err()
            .map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("sh -c 'exit 3' failed with exit status: 3")
        );
    }

    #[test]
    fn output_is_what_was_printed() {
        assert_eq!(
            output(Command::new("printf").arg("a b")).ok().as_deref(),
            Some("a b")
        );
        assert!(!succeeds(&mut Command::new("false")));
    }
}
