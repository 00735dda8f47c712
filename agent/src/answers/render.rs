//! A document in the format asked for.

use stallscope_report::document::Document;
use stallscope_report::text::TextOptions;

/// How a report is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For a terminal
    Text,
    /// One page that needs no other file
    Html,
    /// Schema stallscope.report/1
    Json,
}

/// The report in a format.
///
/// # Errors
/// JSON is fallible by signature; nothing is known to make it fail.
pub fn render(document: &Document, format: Format, colour: bool) -> Result<String, serde_json::Error> {
    match format {
        Format::Text => Ok(stallscope_report::text::render(document, TextOptions { colour })),
        Format::Html => Ok(stallscope_report::html::render(document)),
        Format::Json => document.to_json(),
    }
}
