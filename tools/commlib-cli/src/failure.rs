//! How a command ends: the exit codes, and the one line on stderr that says why.

use std::error::Error as StdError;
use std::fmt;
use std::process::ExitCode;

use commlib::{Error, ErrorKind};

/// Why a command did not end well.
#[derive(Debug)]
pub(crate) enum Failure {
    /// The command line is wrong. Exit 2.
    Usage(String),
    /// The operation failed. Exit 1.
    Failed(String),
    /// The operation failed, and stderr says so already. Exit 1.
    Reported,
    /// Nobody reads our output any more: not our failure. Exit 0.
    OutputClosed,
}

impl Failure {
    pub(crate) fn usage(text: impl fmt::Display) -> Self {
        Self::Usage(text.to_string())
    }

    pub(crate) fn failed(text: impl fmt::Display) -> Self {
        Self::Failed(text.to_string())
    }

    /// A failure of `what` with its cause and the causes below it.
    pub(crate) fn because(what: impl fmt::Display, cause: &dyn StdError) -> Self {
        Self::failed(format_args!("{what}: {}", chain(cause)))
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        let text = chain(&error);
        match error.kind() {
            // All three are cured on the command line and nowhere else.
            ErrorKind::Config | ErrorKind::InvalidAddress | ErrorKind::Unsupported => {
                Self::Usage(text)
            }
            _ => Self::Failed(text),
        }
    }
}

/// An error and its causes as one sentence. A cause that the sentence already holds is not repeated.
pub(crate) fn chain(error: &dyn StdError) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text.push_str(": ");
            text.push_str(&cause_text);
        }
        next = cause.source();
    }
    text
}

/// Writes `error: …` on one line of stderr.
pub(crate) fn report(text: impl fmt::Display) {
    let text = text.to_string();
    let lines: Vec<_> = text
        .lines()
        .map(str::trim)
        .filter(|l| !l.is_empty())
        .collect();
    note(format_args!("error: {}", lines.join(" ")));
}

/// Writes a line to stderr. A closed stderr is nobody's problem, where `eprintln!` would panic.
pub(crate) fn note(text: impl fmt::Display) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// The exit code, after the line that says why.
pub(crate) fn exit(outcome: Result<(), Failure>) -> ExitCode {
    match outcome {
        Ok(()) | Err(Failure::OutputClosed) => ExitCode::SUCCESS,
        Err(Failure::Reported) => ExitCode::from(1),
        Err(Failure::Failed(text)) => {
            report(text);
            ExitCode::from(1)
        }
        Err(Failure::Usage(text)) => {
            report(text);
            ExitCode::from(2)
        }
    }
}

/// What the argument parser has to say: help as it is, mistakes on one line.
pub(crate) fn usage(error: &clap::Error) -> ExitCode {
    use clap::error::ErrorKind as Kind;
    let code = ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
    match error.kind() {
        Kind::DisplayHelp
        | Kind::DisplayVersion
        | Kind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = error.print();
        }
        _ => {
            let text = error.to_string();
            let text = text.strip_prefix("error: ").unwrap_or(&text);
            // The usage and the hint at `--help` follow; who wants them asks for them.
            let end = text.find("\nUsage:").or_else(|| text.find("\nFor more"));
            let text = end.and_then(|end| text.get(..end)).unwrap_or(text);
            report(text.replace("\n\n  tip:", "; tip:"));
        }
    }
    code
}
