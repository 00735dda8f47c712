#![expect(clippy::unwrap_used, reason = "tests")]
use super::values::host_port;
use super::*;

fn message(text: &str) -> String {
    Config::parse(text, "f.toml").unwrap_err().to_string()
}

#[test]
fn default_file_is_all_comments_and_parses_to_defaults() {
    assert_eq!(
        Config::parse(&default_file(), "default").unwrap(),
        Config::default()
    );
}

#[test]
fn default_file_with_every_line_taken_in_is_valid_and_shows_the_defaults() {
    let taken_in: String = default_file()
        .lines()
        .map(|line| {
            line.strip_prefix('#')
                .filter(|rest| !rest.starts_with(' '))
                .unwrap_or(line)
                .to_owned()
                + "\n"
        })
        .collect();
    let config = Config::parse(&taken_in, "default").unwrap();
    assert_eq!(config.node.as_deref(), Some("node-17"));
    assert!(config.stream.target().unwrap().is_some());
    assert!(config.model.declared().unwrap().is_some());
    assert_eq!(config.nvml, Nvml::default());
    assert_eq!(config.nccl, Nccl::default());
    assert_eq!(config.store, Store::default());
    assert_eq!(config.control, Control::default());
}

#[test]
fn unknown_keys_and_bad_values_name_their_line() {
    let unknown = message("node = \"a\"\n\n[nvml]\nlibary = \"x\"\n");
    assert!(
        unknown.starts_with("f.toml:4: unknown field `libary`"),
        "{unknown}"
    );
    let unknown_section = message("\n[nvlm]\n");
    assert!(
        unknown_section.starts_with("f.toml:2: unknown field `nvlm`"),
        "{unknown_section}"
    );
    let range = message("[nvml]\nsample_ms = 5\n");
    assert!(
        range.starts_with("f.toml:2: 5 is out of range: 100 to 60000"),
        "{range}"
    );
    let kind = message("[store]\n\nmax_bytes = \"lots\"\n");
    assert!(kind.starts_with("f.toml:3: invalid type"), "{kind}");
    let syntax = message("node = \n");
    assert!(syntax.starts_with("f.toml:1: "), "{syntax}");
    let relative = message("[scope]\ncgroup = \"slurm\"\n");
    assert!(
        relative.starts_with("f.toml:2: `slurm` must start with `/`"),
        "{relative}"
    );
}

#[test]
fn a_collector_without_certificates_is_refused_at_its_line() {
    let text = message("[stream]\nca = \"/x\"\ncollector = \"c:1\"\n");
    assert!(text.starts_with("f.toml:3: stream.collector needs"), "{text}");
}

#[test]
fn collector_addresses() {
    assert_eq!(host_port("c.example:4433"), Some(("c.example", 4433)));
    assert_eq!(host_port("[fe80::1]:1"), Some(("fe80::1", 1)));
    for bad in [
        "",
        "c",
        "c:",
        ":1",
        "c:0",
        "c:65536",
        "fe80::1:1",
        "[fe80::1:1",
        "[]:1",
    ] {
        assert_eq!(host_port(bad), None, "{bad}");
    }
}

#[test]
fn server_name_defaults_to_the_host() {
    let text = "[stream]\ncollector='10.0.0.1:4433'\nca='a'\ncert='b'\nkey='c'\n";
    let target = Config::parse(text, "f")
        .unwrap()
        .stream
        .target()
        .unwrap()
        .unwrap();
    assert_eq!(
        (target.host.as_str(), target.port, target.server_name.as_str()),
        ("10.0.0.1", 4433, "10.0.0.1")
    );
}

#[test]
fn check_warns_of_files_that_are_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("c.toml");
    std::fs::write(&path, "[probes]\nobject = \"/nonexistent/x.o\"\n").unwrap();
    let (_, warnings) = check(&path).unwrap();
    assert_eq!(warnings.len(), 1);
    assert!(
        warnings[0]
            .text
            .contains("c.toml:2: probes.object: /nonexistent/x.o"),
        "{}",
        warnings[0].text
    );
    assert!(matches!(
        check(&dir.path().join("none")),
        Err(ConfigError::Read { .. })
    ));
}

#[test]
fn a_model_is_declared_by_flops_or_by_shape() {
    let declared = |text: &str| Config::parse(text, "f.toml").unwrap().model.declared().unwrap();
    assert_eq!(declared(""), None);
    assert_eq!(declared("[model]\njob = \"a b\"\n"), None);
    let flops = declared("[model]\nflops_per_step = 3.2e14\nlayers = 3\n").unwrap();
    assert_eq!(flops.flops_per_step(None, None), Some(320_000_000_000_000));
    let of_one = declared("[model]\njob = \"a\"\nflops_per_step = 7\n").unwrap();
    assert_eq!(of_one.flops_per_step(Some("a"), None), Some(7));
    assert_eq!(of_one.flops_per_step(Some("b"), None), None);
    assert_eq!(of_one.flops_per_step(None, None), None);

    // (6 * 7e9 + 12 * 32 * 32 * 128 * 4096) * 1000 / 8, in each way to write numbers.
    let shape = "[model]\nparameters = 7e9\nlayers = 32\nheads = \"32\"\nhead_size = 128.0\nsequence = 4_096\n\
                 tokens_per_step = \"1e3\"\n";
    let shape = declared(shape).unwrap();
    assert_eq!(shape.flops_per_step(None, Some(8)), Some(6_055_306_368_000));
    assert_eq!(shape.flops_per_step(None, None), None, "ranks are not guessed");
    assert_eq!(shape.flops_per_step(None, Some(0)), None);
}

/// PaLM 540B: 4,194,304 tokens per step on 6,144 TPU v4 of 275 TFLOP/s, 238.3 thousand tokens/s; published MFU 46.2 %.
#[test]
fn palm_has_its_published_utilisation_by_its_shape() {
    use stallscope_attribution::flops::utilisation_ppm;
    let text = "[model]\nparameters = 540e9\nlayers = 118\nheads = 48\nhead_size = 256\nsequence = 2048\n\
                tokens_per_step = 4_194_304\n";
    let model = Config::parse(text, "f")
        .unwrap()
        .model
        .declared()
        .unwrap()
        .unwrap();
    let flops = model.flops_per_step(Some("palm"), Some(6144)).unwrap();
    let step_ns = 4_194_304 * 1_000_000_000 / 238_300;
    let mfu = utilisation_ppm(flops, step_ns * 1000, 275_000_000_000);
    assert_eq!(mfu, Some(461_993));
}

#[test]
fn what_is_no_model_is_refused_at_its_line() {
    let missing = message("[model]\n\nlayers = 32\nheads = 32\nsequence = 4096\ntokens_per_step = 1000\n");
    assert!(
        missing.starts_with("f.toml:3: the model's shape lacks model.parameters, model.head_size:"),
        "{missing}"
    );
    for bad in ["0", "-1", "1.5", "nan", "inf", "true", "\"many\"", "\"\""] {
        let text = message(&format!("[model]\nlayers = 1\nheads = {bad}\n"));
        assert!(
            text.starts_with("f.toml:3: ") && text.contains("a whole number above 0"),
            "{text}"
        );
    }
    let large = message(
        "[model]\nparameters = 9e18\nlayers = 1\nheads = 1\nhead_size = 1\nsequence = 1\ntokens_per_step = 1\n",
    );
    assert!(
        large.starts_with("f.toml:2: ") && large.contains("2^64"),
        "{large}"
    );
}
