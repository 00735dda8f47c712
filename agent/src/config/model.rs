//! What the file declares of the model.

use stallscope_attribution::flops::Shape;

use super::{Incomplete, Model};

/// FLOPs of the model, for jobs that do not declare their own; see [`Model::declared`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeclaredModel {
    /// The only job it is said of.
    job: Option<String>,
    per_step: PerStep,
}

/// Whose FLOPs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum PerStep {
    OfGpu(u64),
    OfJob(u128),
}

impl DeclaredModel {
    /// FLOPs per step of one GPU of a job with so many ranks; `None` when it is not said of that job, or the ranks must
    /// be known and are not.
    #[must_use]
    pub fn flops_per_step(&self, job: Option<&str>, ranks: Option<u32>) -> Option<u64> {
        if self.job.is_some() && self.job.as_deref() != job {
            return None;
        }
        match self.per_step {
            PerStep::OfGpu(flops) => Some(flops),
            PerStep::OfJob(flops) => u64::try_from(flops.checked_div(ranks?.into())?).ok(),
        }
    }
}

impl Model {
    /// What is declared: `None` when nothing is.
    ///
    /// # Errors
    /// When some numbers of a shape are given and others are not, or they are larger than any model. A parsed
    /// [`Config`](super::Config) never gives this.
    pub fn declared(&self) -> Result<Option<DeclaredModel>, Incomplete> {
        let per_step = match self.flops_per_step {
            Some(flops) => Some(PerStep::OfGpu(flops)),
            None => self.of_shape()?.map(PerStep::OfJob),
        };
        Ok(per_step.map(|per_step| DeclaredModel {
            job: self.job.clone(),
            per_step,
        }))
    }

    /// FLOPs of the whole job per step.
    fn of_shape(&self) -> Result<Option<u128>, Incomplete> {
        let numbers = [
            ("parameters", self.parameters),
            ("layers", self.layers),
            ("heads", self.heads),
            ("head_size", self.head_size),
            ("sequence", self.sequence),
            ("tokens_per_step", self.tokens_per_step),
        ];
        let refused = |message: String| Incomplete {
            section: "model",
            key: numbers
                .iter()
                .find_map(|(key, number)| number.map(|_| *key))
                .unwrap_or("parameters"),
            message,
        };
        let [
            Some(parameters),
            Some(layers),
            Some(heads),
            Some(head_size),
            Some(sequence),
            Some(tokens),
        ] = numbers.map(|(_, number)| number)
        else {
            let missing: Vec<String> = numbers
                .iter()
                .filter(|(_, number)| number.is_none())
                .map(|(key, _)| format!("model.{key}"))
                .collect();
            return if missing.len() == numbers.len() {
                Ok(None)
            } else {
                Err(refused(format!(
                    "the model's shape lacks {}: without it MFU stays unknown; add it, or give model.flops_per_step instead",
                    missing.join(", ")
                )))
            };
        };
        let one_token = Shape {
            parameters,
            layers,
            heads,
            head_size,
            sequence,
            tokens_per_gpu: 1,
            recompute_ppm: 0,
        };
        let per_token = one_token.model_flops_per_step().map_err(|_| {
            refused(
                "the model's shape has more than 2^64 FLOPs per token: one of its numbers is wrong"
                    .to_owned(),
            )
        })?;
        Ok(Some(u128::from(per_token) * u128::from(tokens)))
    }
}
