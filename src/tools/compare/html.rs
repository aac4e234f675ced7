//! The report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

use super::report::Report;
use crate::tools::measure::Summary;

/// What is the same in every report, with names in braces for the rest.
const PAGE: &str = include_str!("report.html");

/// Plots are drawn in these units; the browser scales them.
const WIDTH: f64 = 880.0;
/// Where the runtimes' names end and the axis begins.
const LEFT: f64 = 110.0;
/// What stays free on the right for the values of the longest row.
const RIGHT: f64 = 180.0;
/// Height of a runtime's row, and of the marks in it.
const ROW: f64 = 30.0;
const MARK: f64 = 18.0;
/// Width of a mark that is a point.
const STROKE: f64 = 3.0;

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let mut plots = String::new();
    for (title, rows) in report.times() {
        let rows: Vec<_> = rows.iter().map(|row| strokes(row.0, row.1)).collect();
        plots += &plot(title, "ms", &rows);
    }
    let measured = || report.rows.iter().filter(|row| row.error.is_none());
    let memory: Vec<_> = measured()
        .map(|row| bar(&row.name, &[row.peak_kib << 10, row.daemons_kib << 10]))
        .collect();
    let title = "private memory of a run at most, and (lighter) of daemons that serve all runs";
    plots += &plot(title, "MiB", &memory);
    let shipped: Vec<_> = measured()
        .map(|row| {
            let parts = [row.image_bytes, row.kernel_bytes, row.programs_bytes];
            bar(&row.name, &parts)
        })
        .collect();
    let title =
        "what is shipped: image, (lighter) kernel, (lightest) programs that the host must have";
    plots += &plot(title, "MiB", &shipped);

    let mut table = Vec::new();
    // Writing to memory cannot fail.
    let _ = report.table(&mut table);
    [
        ("{command}", escape(&report.command.join(" "))),
        ("{rootfs}", escape(&report.rootfs)),
        ("{headline}", headline(report)),
        ("{table}", escape(&String::from_utf8_lossy(&table))),
        ("{plots}", plots),
    ]
    .iter()
    .fold(PAGE.to_owned(), |page, (name, text)| {
        page.replace(name, text)
    })
}

/// The answer in a sentence.
fn headline(report: &Report) -> String {
    let vm = report.rows.iter().find(|row| row.is_vm);
    let vm = vm.and_then(|row| Some((row.warm_end.as_ref()?.median_ms, row.end_ratio?)));
    let (Some(reference), Some((ms, ratio))) = (&report.reference, vm) else {
        return "Not both a container and the virtual machine could be measured; what failed is said below.".into();
    };
    let same = if report.same_output {
        "All that ran it printed the same."
    } else {
        "What the command printed was not the same everywhere."
    };
    format!(
        "In a virtual machine of minivmm it takes <strong>{ms:.1} ms, {ratio:.1} times</strong> what it takes in {} \
         (median of {} warm runs, to the end of the process). {same}",
        escape(reference),
        report.runs
    )
}

/// A runtime's row in a plot.
struct PlotRow<'a> {
    name: &'a str,
    /// Class, start and end of each.
    marks: Vec<(String, f64, f64)>,
    /// Where the last mark ends, and what is written behind it.
    end: f64,
    text: String,
}

/// A faint stroke for each run, a full one for the median.
fn strokes<'a>(name: &'a str, times: &Summary) -> PlotRow<'a> {
    let runs = times.samples_ms.iter().map(|ms| ("run".into(), *ms, *ms));
    let median = ("median".into(), times.median_ms, times.median_ms);
    PlotRow {
        name,
        marks: runs.chain([median]).collect(),
        end: times.max_ms,
        text: format!("{:.1} ms", times.median_ms),
    }
}

/// A bar of bytes, in parts one behind another.
fn bar<'a>(name: &'a str, parts: &[u64]) -> PlotRow<'a> {
    let mut end = 0.0;
    let mut marks = Vec::new();
    let mut shown = Vec::new();
    for (number, bytes) in parts.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
        let part = *bytes as f64 / f64::from(1 << 20);
        marks.push((format!("part{number}"), end, end + part));
        shown.push(format!("{part:.1}"));
        end += part;
    }
    PlotRow {
        name,
        marks,
        end,
        text: format!("{} MiB", shown.join(" + ")),
    }
}

/// A plot with an axis from 0; nothing without rows.
fn plot(title: &str, unit: &str, rows: &[PlotRow<'_>]) -> String {
    if rows.is_empty() {
        return String::new();
    }
    let max = rows.iter().map(|row| row.end).fold(0.0, f64::max);
    let max = if max > 0.0 { max } else { 1.0 };
    let scale = |value: f64| LEFT + value / max * (WIDTH - LEFT - RIGHT);
    let bottom = ROW * rows.len() as f64;
    let (height, ticks_at) = (bottom + 24.0, bottom + 16.0);
    let mut html = format!(
        "<figure><figcaption>{title}, {unit}</figcaption><svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\">"
    );
    let step = step(max);
    for i in 0..=(max / step) as u32 {
        let value = step * f64::from(i);
        let (x, shown) = (scale(value), (value * 1e6).round() / 1e6);
        html += &format!(
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{ticks_at}\">{shown}</text>"
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let top = ROW * i as f64 + (ROW - MARK) / 2.0;
        let base = top + MARK - 4.0;
        let kind = if row.name.starts_with("minivmm") {
            "vm"
        } else {
            "container"
        };
        let (name_at, name) = (LEFT - 10.0, escape(row.name));
        html += &format!(
            "<g class=\"{kind}\"><text class=\"name\" x=\"{name_at}\" y=\"{base}\">{name}</text>"
        );
        for (class, start, end) in &row.marks {
            let (x, width) = (scale(*start), (scale(*end) - scale(*start)).max(STROKE));
            html += &format!(
                "<rect class=\"{class}\" x=\"{x:.1}\" y=\"{top}\" width=\"{width:.1}\" height=\"{MARK}\"/>"
            );
        }
        let (text_at, text) = (scale(row.end) + 10.0, &row.text);
        html += &format!("<text x=\"{text_at:.1}\" y=\"{base}\">{text}</text></g>");
    }
    html + "</svg></figure>\n"
}

/// Between two ticks: 1, 2 or 5 times a power of ten, so that there are four to ten.
fn step(max: f64) -> f64 {
    let power = 10f64.powf(max.log10().floor());
    match max / power {
        ratio if ratio < 2.0 => power / 5.0,
        ratio if ratio < 5.0 => power / 2.0,
        _ => power,
    }
}

/// Text as it may stand anywhere in HTML.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
        .replace('\'', "&#39;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_axis_has_a_few_round_ticks() {
        for (max, wanted) in [
            (1.0, 0.2),
            (9.9, 1.0),
            (240.0, 50.0),
            (4321.0, 500.0),
            (0.03, 0.005),
        ] {
            let step = step(max);
            assert!((step - wanted).abs() < 1e-9, "{max}: {step}");
            assert!((4.0..=10.0).contains(&(max / step)), "{max}");
        }
    }

    #[test]
    fn text_is_no_markup() {
        assert_eq!(escape("<a b='c'>&\""), "&lt;a b=&#39;c&#39;&gt;&amp;&quot;");
    }
}
