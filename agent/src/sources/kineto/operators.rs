//! What operators tell beyond what their thread did: forward work issued again in the backward pass, and arithmetic.

use std::collections::BTreeMap;

use memchr::memmem;
use serde::Deserialize;
use serde_json::Value;
use stallscope_attribution::activity::{Issued, MathOp};
use stallscope_attribution::peaks::Precision;
use stallscope_attribution::time::Window;

/// Takes operators in any order.
#[derive(Debug, Default)]
pub(super) struct Operators {
    threads: BTreeMap<u32, Thread>,
    math: Vec<MathOp>,
}

#[derive(Debug, Default)]
struct Thread {
    /// Nodes of the backward graph.
    nodes: Vec<Window>,
    /// Operators that were recorded in a graph: forward work, wherever it runs.
    recorded: Vec<Window>,
    /// Gradients that were recorded in a graph themselves: a second derivative, and no forward work.
    second: Vec<Window>,
}

/// The arguments that matter here.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Args {
    #[serde(rename = "Input Dims")]
    dims: Value,
    #[serde(rename = "Input type")]
    types: Value,
    #[serde(rename = "Concrete Inputs")]
    concrete: Value,
}

/// What an operator is here, by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Role {
    /// Runs a node of the backward graph.
    Node,
    /// Any other; whether it computes a gradient, and how its operands make FLOPs.
    Operator { is_gradient: bool, form: Option<Form> },
    /// No operator that autograd records: a Python function or a profiler's own mark.
    None,
}

impl Role {
    /// By the name.
    pub(super) fn of(name: &str) -> Self {
        if name.starts_with("autograd::engine::evaluate_function") {
            Self::Node
        } else if name.contains(".py(") || name.starts_with("<built-in") {
            Self::None
        } else {
            Self::Operator {
                is_gradient: name.ends_with("_backward"),
                form: form(name),
            }
        }
    }
}

impl Operators {
    /// Takes an operator with the text of its arguments.
    pub(super) fn take(&mut self, role: Role, window: Window, thread: u32, args: &[u8]) {
        let (is_gradient, form) = match role {
            Role::Node => return push(&mut self.threads.entry(thread).or_default().nodes, window),
            Role::Operator { is_gradient, form } => (is_gradient, form),
            Role::None => return,
        };
        if is_recorded(args) {
            let of = self.threads.entry(thread).or_default();
            push(&mut of.recorded, window);
            if is_gradient {
                of.second.push(window);
            }
        }
        if let Some(form) = form
            && let Some((flops, precision)) = arithmetic(form, args)
        {
            self.math.push(MathOp {
                thread,
                window,
                flops,
                precision,
            });
        }
    }

    /// When forward work was issued inside a node of the backward graph. Activation checkpointing does so before the
    /// node's own gradient, so from the first recorded operator to the last all of it is repeated.
    pub(super) fn repeated(&self) -> Vec<Issued> {
        let mut found = Vec::new();
        for (thread, of) in &self.threads {
            let (mut nodes, mut recorded) = (of.nodes.clone(), of.recorded.clone());
            nodes.sort_unstable();
            recorded.sort_unstable();
            let mut end = 0;
            for node in nodes {
                // Nodes that a node runs itself are part of it.
                if node.end_ns() <= end {
                    continue;
                }
                end = node.end_ns();
                let from = recorded.partition_point(|window| window.start_ns() < node.start_ns());
                let inside = recorded[from..]
                    .iter()
                    .take_while(|window| window.start_ns() < node.end_ns())
                    .filter(|window| window.end_ns() <= node.end_ns());
                let hull = inside.copied().reduce(|all, next| {
                    Window::new(all.start_ns(), all.end_ns().max(next.end_ns())).unwrap_or(all)
                });
                let is_second =
                    |hull: &Window| of.second.iter().any(|window| window.intersect(*hull).is_some());
                if let Some(window) = hull.filter(|hull| !is_second(hull)) {
                    found.push(Issued {
                        thread: *thread,
                        window,
                    });
                }
            }
        }
        found
    }

    /// The arithmetic found so far.
    pub(super) fn math(&mut self) -> Vec<MathOp> {
        std::mem::take(&mut self.math)
    }
}

/// Operators come as they nest or as they follow: one inside the last is no news.
fn push(windows: &mut Vec<Window>, window: Window) {
    let nested = |last: &Window| last.start_ns() <= window.start_ns() && window.end_ns() <= last.end_ns();
    if !windows.last().is_some_and(nested) {
        windows.push(window);
    }
}

/// Whether the operator has a sequence number of its own: autograd gives one to what it records, and names thread 0
/// as the forward thread of what is not itself a gradient.
fn is_recorded(args: &[u8]) -> bool {
    const KEY: &[u8] = b"\"Fwd thread id\":";
    memmem::find(args, KEY).is_some_and(|at| {
        let value = args[at + KEY.len()..].trim_ascii_start();
        value.first() == Some(&b'0') && !value.get(1).is_some_and(u8::is_ascii_digit)
    }) && memmem::find(args, b"\"Sequence number\":").is_some()
}

/// How operands make FLOPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// A matrix product of these two operands.
    Product(usize, usize),
    /// A convolution forward.
    Convolution,
    /// Both gradients of a convolution; positions of the output's gradient and the weight.
    ConvolutionBackward(usize, usize),
    /// Attention over query, key and value at these positions, and how often its FLOPs count.
    Attention(usize, u64),
}

/// Operators that launch matrix kernels themselves: composites that call them are left out, or work would count twice.
fn form(name: &str) -> Option<Form> {
    Some(match name.strip_prefix("aten::")? {
        "mm" | "bmm" | "_scaled_mm" => Form::Product(0, 1),
        "addmm" | "baddbmm" | "_addmm_activation" => Form::Product(1, 2),
        "convolution" => Form::Convolution,
        "convolution_backward" => Form::ConvolutionBackward(0, 2),
        "cudnn_convolution_backward" => Form::ConvolutionBackward(1, 2),
        "_scaled_dot_product_flash_attention"
        | "_scaled_dot_product_efficient_attention"
        | "_scaled_dot_product_cudnn_attention" => Form::Attention(0, 1),
        "_scaled_dot_product_flash_attention_backward"
        | "_scaled_dot_product_efficient_attention_backward"
        | "_scaled_dot_product_cudnn_attention_backward" => Form::Attention(1, 2),
        _ => return None,
    })
}

fn arithmetic(form: Form, args: &[u8]) -> Option<(u64, Precision)> {
    let args: Args = serde_json::from_slice(args).ok()?;
    let shape = |at: usize| -> Option<Vec<u64>> {
        let sizes = args.dims.get(at)?.as_array()?.iter().map(Value::as_u64);
        sizes
            .collect::<Option<Vec<u64>>>()
            .filter(|sizes| !sizes.is_empty())
    };
    let (first, flops) = match form {
        Form::Product(left, right) => (left, product(&shape(left)?, &shape(right)?)?),
        Form::Convolution => (0, convolution(&shape(0)?, &shape(1)?, &args.concrete)?),
        Form::ConvolutionBackward(output, weight) => {
            let once = passes(&shape(output)?, &shape(weight)?)?;
            (output, once.checked_mul(2)?)
        }
        Form::Attention(query, times) => {
            let once = attention(&shape(query)?, &shape(query + 1)?)?;
            (query, once.checked_mul(times)?)
        }
    };
    Some((flops, precision(args.types.get(first)?.as_str()?)?))
}

fn precision(name: &str) -> Option<Precision> {
    Some(match name {
        "float" => Precision::Fp32,
        "c10::Half" | "c10::BFloat16" => Precision::Half,
        name if name.contains("Float8") => Precision::Fp8,
        _ => return None,
    })
}

fn all(sizes: &[u64]) -> Option<u64> {
    sizes
        .iter()
        .try_fold(1_u64, |product, size| product.checked_mul(*size))
}

/// `2 M N K` for each matrix of a batch.
fn product(left: &[u64], right: &[u64]) -> Option<u64> {
    let columns = right.last()?;
    (left.len() >= 2 && left.last() == right.get(right.len().checked_sub(2)?))
        .then(|| all(left)?.checked_mul(2)?.checked_mul(*columns))?
}

/// Twice the output's elements times the weights of one output channel.
fn passes(output: &[u64], weight: &[u64]) -> Option<u64> {
    all(output)?.checked_mul(2)?.checked_mul(all(weight.get(1..)?)?)
}

/// Arguments of `aten::convolution`: input, weight, bias, stride, padding, dilation, transposed, ...
fn convolution(input: &[u64], weight: &[u64], concrete: &Value) -> Option<u64> {
    let written = |at: usize| concrete.get(at)?.as_str();
    let list = |at: usize| -> Option<Vec<u64>> { serde_json::from_str(written(at)?).ok() };
    let (stride, padding, dilation) = (list(3)?, list(4)?, list(5)?);
    if written(6)? != "False" {
        return None;
    }
    let mut output = vec![*input.first()?, *weight.first()?];
    for (at, size) in input.get(2..)?.iter().enumerate() {
        let of = |values: &[u64]| values.get(at).or(values.first()).copied();
        let kernel = weight
            .get(2 + at)?
            .checked_sub(1)?
            .checked_mul(of(&dilation)?)?
            .checked_add(1)?;
        let room = size
            .checked_add(of(&padding)?.checked_mul(2)?)?
            .checked_sub(kernel)?;
        output.push(room.checked_div(of(&stride)?)?.checked_add(1)?);
    }
    passes(&output, weight)
}

/// Scores and their product with the values over the full square, as MFU counts it: `4 B H T S D`.
fn attention(query: &[u64], key: &[u64]) -> Option<u64> {
    let keys = key.get(key.len().checked_sub(2)?)?;
    all(query)?.checked_mul(*keys)?.checked_mul(4)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn window(start: u64, end: u64) -> Window {
        Window::new(start, end).unwrap()
    }

    const RECORDED: &str = r#"{"Sequence number": 930, "Fwd thread id": 0}"#;
    const GRADIENT: &str = r#"{"Sequence number": 930, "Fwd thread id": 1}"#;

    fn repeated(operators: &[(&str, u64, u64, &str)]) -> Vec<(u64, u64)> {
        let mut found = Operators::default();
        for (name, start, end, args) in operators {
            found.take(Role::of(name), window(*start, *end), 7, args.as_bytes());
        }
        let windows = found.repeated().into_iter();
        windows
            .map(|issued| (issued.window.start_ns(), issued.window.end_ns()))
            .collect()
    }

    #[test]
    fn forward_work_inside_a_gradient_is_repeated() {
        let node = "autograd::engine::evaluate_function: ReluBackward0";
        let operators = [
            ("aten::relu", 0, 10, RECORDED),
            (node, 100, 200, GRADIENT),
            ("aten::conv2d", 110, 120, RECORDED),
            ("aten::convolution", 112, 118, RECORDED),
            ("aten::relu", 130, 140, RECORDED),
            ("aten::threshold_backward", 150, 190, "{}"),
        ];
        assert_eq!(repeated(&operators), [(110, 140)]);
    }

    #[test]
    fn a_second_derivative_is_no_repetition() {
        let operators = [
            (
                "autograd::engine::evaluate_function: MmBackward0",
                100,
                200,
                GRADIENT,
            ),
            ("aten::mm", 110, 120, RECORDED),
            ("aten::convolution_backward", 130, 140, RECORDED),
        ];
        assert!(repeated(&operators).is_empty());
    }

    fn flops(name: &str, args: &str) -> Option<(u64, Precision)> {
        arithmetic(form(name)?, args.as_bytes())
    }

    #[test]
    fn shapes_tell_the_arithmetic() {
        let addmm = r#"{"Input Dims": [[512], [1024, 1705], [1705, 512], [], []], "Input type": ["float", "float", "float", "Scalar", "Scalar"]}"#;
        assert_eq!(
            flops("aten::addmm", addmm),
            Some((2 * 1024 * 1705 * 512, Precision::Fp32))
        );
        let bmm = r#"{"Input Dims": [[16, 27, 16], [16, 16, 27]], "Input type": ["c10::Half", "c10::Half"]}"#;
        assert_eq!(
            flops("aten::bmm", bmm),
            Some((2 * 16 * 27 * 16 * 27, Precision::Half))
        );
        // ResNet's first layer: 224 x 224 through 7 x 7 at stride 2 with padding 3 gives 112 x 112.
        let conv = r#"{"Input Dims": [[32, 3, 224, 224], [64, 3, 7, 7], [], [], [], [], [], [], []],
            "Input type": ["float", "float", ""],
            "Concrete Inputs": ["", "", "", "[2, 2]", "[3, 3]", "[1, 1]", "False", "[0, 0]", "1"]}"#;
        let layer = 2 * 32 * 64 * 112 * 112 * 3 * 7 * 7;
        assert_eq!(flops("aten::convolution", conv), Some((layer, Precision::Fp32)));
        let backward = r#"{"Input Dims": [[32, 64, 112, 112], [32, 3, 224, 224], [64, 3, 7, 7]], "Input type": ["float", "float", "float"]}"#;
        assert_eq!(
            flops("aten::convolution_backward", backward),
            Some((2 * layer, Precision::Fp32))
        );
        let attention = r#"{"Input Dims": [[2, 8, 128, 64], [2, 8, 128, 64], [2, 8, 128, 64]], "Input type": ["c10::BFloat16"]}"#;
        let scores = 2 * 2 * 8 * 128 * 128 * 64;
        assert_eq!(
            flops("aten::_scaled_dot_product_flash_attention", attention),
            Some((2 * scores, Precision::Half))
        );
    }

    #[test]
    fn shapes_that_do_not_fit_tell_nothing() {
        let cases = [
            r#"{"Input Dims": [[2, 3], [4, 5]], "Input type": ["float"]}"#,
            r#"{"Input Dims": [[18446744073709551615, 3], [3, 18446744073709551615]], "Input type": ["float"]}"#,
            r#"{"Input Dims": [[], []], "Input type": ["float"]}"#,
            r#"{"Input Dims": "x", "Input type": ["float"]}"#,
            r#"{"Input Dims": [[2, 3], [3, 5]], "Input type": ["long"]}"#,
            r#"{"Input Dims": [[2, 3], [3, -5]], "Input type": ["float"]}"#,
            "{",
        ];
        for args in cases {
            assert_eq!(flops("aten::mm", args), None, "{args}");
        }
        assert_eq!(flops("aten::linear", cases[0]), None);
    }
}
