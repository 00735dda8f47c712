//! Compiles every `.proto` file of the schema; needs no protoc.

use std::error::Error;
use std::path::PathBuf;

fn main() -> Result<(), Box<dyn Error>> {
    let schema = "stallscope/v1";
    println!("cargo:rerun-if-changed={schema}");
    let mut files: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(schema)? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "proto") {
            println!("cargo:rerun-if-changed={}", path.display());
            files.push(path);
        }
    }
    files.sort();
    let descriptors = protox::compile(&files, ["."])?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)?;
    Ok(())
}
