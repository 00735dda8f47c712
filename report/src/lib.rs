//! Rendering: a [`document::Document`] is the answer of stallscope in its stable JSON form, and every other format
//! is rendered from it, so all of them tell the same story.
//!
//! Pure: no I/O and no clock. Names that come from a job or a node are treated as hostile: control characters never
//! reach a terminal and markup never reaches a page.
#![forbid(unsafe_code)]

pub mod document;
mod format;
pub mod html;
mod markup;
pub mod share;
pub mod svg;
pub mod text;
mod view;
pub mod words;

#[cfg(test)]
mod fixtures;
