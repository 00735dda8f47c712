#![expect(clippy::unwrap_used, reason = "tests")]

use proptest::prelude::*;

use super::*;
use crate::fixtures;

fn page(analysis: &stallscope_attribution::job::JobAnalysis) -> String {
    render(&Document::from(analysis))
}

/// The page without its style sheet, which is checked in as a file of its own.
fn body(page: &str) -> &str {
    page.split_once("</style>").unwrap().1
}

#[test]
fn straggler() {
    insta::assert_snapshot!(body(&page(&fixtures::thermal_straggler())));
}

#[test]
fn healthy() {
    insta::assert_snapshot!(body(&page(&fixtures::healthy())));
}

#[test]
fn unexplained() {
    insta::assert_snapshot!(body(&page(&fixtures::unexplained())));
}

#[test]
fn a_report_without_jobs_says_so() {
    assert!(render(&Document::from_analyses([])).contains("No job was recorded"));
}

#[test]
fn the_page_needs_nothing_from_outside() {
    for analysis in [fixtures::with_gaps(), fixtures::hostile(fixtures::HOSTILE)] {
        let page = page(&analysis);
        for outside in [
            "<script",
            "<link",
            "<img",
            "src=",
            "href=",
            "@import",
            "url(http",
            "javascript:",
        ] {
            assert!(!page.contains(outside), "{outside}");
        }
    }
}

#[test]
fn the_picture_file_stands_alone() {
    let document = Document::from(&fixtures::thermal_straggler());
    insta::assert_snapshot!(svg::waterfall_file(&document.jobs[0]));
}

/// Every tag of a page and how often it is opened or closed: foreign text that became markup would change it.
fn tags(page: &str) -> Vec<(String, usize)> {
    let mut tags = std::collections::BTreeMap::new();
    for tag in body(page).split('<').skip(1) {
        let name: String = tag
            .chars()
            .take_while(|c| !c.is_whitespace() && *c != '>')
            .collect();
        *tags.entry(name).or_insert(0) += 1;
    }
    tags.into_iter().collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn foreign_text_never_becomes_markup(text in r#"[a-z<>&"'/=` \x1b\x00!-]{0,40}"#) {
        let (hostile, harmless) = (fixtures::hostile(&format!("{text}x")), fixtures::hostile("harmless"));
        let (hostile, harmless) = (page(&hostile), page(&harmless));
        prop_assert_eq!(tags(&hostile), tags(&harmless));
        prop_assert_eq!(hostile.matches('"').count(), harmless.matches('"').count());
        if text.contains(['<', '>', '"', '\'']) {
            let verbatim = format!(">{text}x");
            prop_assert!(!body(&hostile).contains(&verbatim));
        }
    }
}
