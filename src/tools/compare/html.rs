//! The report as one HTML file that needs nothing else: no script, no font, no picture from elsewhere.

use std::fmt::Write;

use super::report::{LIMITS, METHOD, Report, RowReport, mib};
use crate::tools::measure::Summary;

const STYLE: &str = include_str!("report.css");

/// Plots are drawn in these units; the browser scales them.
const WIDTH: f64 = 880.0;
/// Where the runtimes' names end and the axis begins.
const LEFT: f64 = 90.0;
/// What stays free on the right for the values of the longest row.
const RIGHT: f64 = 180.0;
/// Height of a runtime's row.
const ROW: f64 = 30.0;

/// The whole page.
pub(super) fn page(report: &Report) -> String {
    let command = escape(&report.command.join(" "));
    let mut html = format!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>minivmm compare: {command}</title><style>{STYLE}</style></head><body><main>\n\
         <h1>One command, in containers and in a virtual machine</h1>\n<p class=\"lead\"><code>{command}</code> on {}</p>\n<p>{}</p>\n",
        escape(&report.rootfs),
        headline(report),
    );
    for (title, rows) in report.times() {
        let rows: Vec<_> = rows.iter().map(|row| dots(row.0, row.1)).collect();
        html += &plot(title, "ms", &rows);
    }
    let rows = || report.rows.iter().filter(|row| row.error.is_none());
    let memory: Vec<_> = rows()
        .map(|row| bars(&row.name, &[row.peak_kib << 10, row.daemons_kib << 10]))
        .collect();
    let title = "private memory of a run at most, and (lighter) of daemons that serve all runs";
    html += &plot(title, "MiB", &memory);
    let shipped: Vec<_> = rows()
        .map(|row| {
            let parts = [row.image_bytes, row.kernel_bytes, row.programs_bytes];
            bars(&row.name, &parts)
        })
        .collect();
    let title =
        "what is shipped: image, (lighter) kernel, (lightest) programs that the host must have";
    html += &plot(title, "MiB", &shipped);
    table(&mut html, report);
    definitions(
        &mut html,
        "What it shares with the host",
        report,
        |row| match &row.error {
            Some(error) => format!("failed: {error}"),
            None => row.sharing(),
        },
    );
    definitions(&mut html, "Commands", report, |row| {
        let programs = row.programs.join(", ");
        format!("{}; programs: {programs} ({})", row.command, row.version)
    });
    let cold = format!("Cold: {}.", report.cold);
    let method: Vec<&str> = METHOD.iter().copied().chain([&*cold]).collect();
    for (title, texts) in [
        ("How it was measured", &method[..]),
        ("What it does not show", LIMITS),
    ] {
        let _ = write!(html, "<h2>{title}</h2><ul>");
        for text in texts {
            let _ = write!(html, "<li>{}</li>", escape(text));
        }
        html += "</ul>\n";
    }
    let _ = write!(
        html,
        "<h2>Where</h2><p>{}; virtual machine: kernel {}, {} CPUs, {} MiB; minivmm {}.</p>\n</main></body></html>\n",
        escape(&report.host.to_string()),
        escape(&report.kernel),
        report.vm_cpus,
        report.vm_memory_mib,
        report.minivmm,
    );
    html
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
    marks: Vec<Mark>,
    /// Where the last mark ends, and what is written behind it.
    end: f64,
    text: String,
}

enum Mark {
    Run(f64),
    Median(f64),
    /// Part of a bar: its number, start and end.
    Part(usize, f64, f64),
}

/// A dot for each run, a stroke for the median.
fn dots<'a>(name: &'a str, times: &Summary) -> PlotRow<'a> {
    let runs = times.samples_ms.iter().map(|ms| Mark::Run(*ms));
    PlotRow {
        name,
        marks: runs.chain([Mark::Median(times.median_ms)]).collect(),
        end: times.max_ms,
        text: format!("{:.1} ms", times.median_ms),
    }
}

/// A bar of bytes, in parts one behind another.
fn bars<'a>(name: &'a str, parts: &[u64]) -> PlotRow<'a> {
    let mut end = 0.0;
    let mut marks = Vec::new();
    let mut shown = Vec::new();
    for (number, bytes) in parts.iter().enumerate().filter(|(_, bytes)| **bytes > 0) {
        let part = *bytes as f64 / f64::from(1 << 20);
        marks.push(Mark::Part(number, end, end + part));
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
    let mut html = format!(
        "<figure><figcaption>{title}, {unit}</figcaption><svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{title}\">",
        bottom + 24.0
    );
    let step = step(max);
    for i in 0..=(max / step) as u32 {
        let value = step * f64::from(i);
        let x = scale(value);
        let _ = write!(
            html,
            "<line class=\"grid\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"0\" y2=\"{bottom}\"/>\
             <text class=\"tick\" x=\"{x:.1}\" y=\"{}\">{}</text>",
            bottom + 16.0,
            (value * 1e6).round() / 1e6
        );
    }
    for (i, row) in rows.iter().enumerate() {
        let y = ROW * (i as f64 + 0.5);
        let marks = row.marks.iter().map(|mark| match mark {
            Mark::Run(at) => format!(
                "<circle class=\"run\" cx=\"{:.1}\" cy=\"{y}\" r=\"4\"/>",
                scale(*at)
            ),
            Mark::Median(at) => format!(
                "<line class=\"median\" x1=\"{0:.1}\" x2=\"{0:.1}\" y1=\"{1}\" y2=\"{2}\"/>",
                scale(*at),
                y - 11.0,
                y + 11.0
            ),
            Mark::Part(number, start, end) => format!(
                "<rect class=\"part{number}\" x=\"{:.1}\" y=\"{}\" width=\"{:.1}\" height=\"18\"/>",
                scale(*start),
                y - 9.0,
                scale(*end) - scale(*start)
            ),
        });
        let class = match row.name {
            "minivmm" | "minivmm restore" => "vm",
            _ => "container",
        };
        let _ = write!(
            html,
            "<g class=\"{class}\"><text class=\"name\" x=\"{}\" y=\"{base}\">{}</text>{}<text x=\"{:.1}\" y=\"{base}\">{}</text></g>",
            LEFT - 10.0,
            escape(row.name),
            marks.collect::<String>(),
            scale(row.end) + 10.0,
            row.text,
            base = y + 4.0,
        );
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

fn table(html: &mut String, report: &Report) {
    let reference = report.reference.as_deref().unwrap_or("none");
    let _ = write!(
        html,
        "<h2>In numbers</h2><div class=\"wide\"><table><thead><tr><th></th><th colspan=\"4\">end, warm: median, p90, p99, least (ms)</th>\
         <th>x {}</th><th>first output (ms)</th><th>end, cold (ms)</th><th>prepare, once (ms)</th><th>memory</th><th>image + kernel</th>\
         <th>kernel seen</th><th>status</th></tr></thead><tbody>",
        escape(reference)
    );
    let number = |value: Option<f64>| value.map_or("-".into(), |value| format!("{value:.1}"));
    let median = |times: &Option<Summary>| number(times.as_ref().map(|times| times.median_ms));
    for row in &report.rows {
        let _ = write!(html, "<tr><th>{}</th>", escape(&row.name));
        if row.error.is_some() {
            *html += "<td colspan=\"12\" class=\"error\">failed, see below</td></tr>\n";
            continue;
        }
        let warm = |column: fn(&Summary) -> f64| number(row.warm_end.as_ref().map(column));
        for cell in [
            warm(|times| times.median_ms),
            warm(|times| times.p90_ms),
            warm(|times| times.p99_ms),
            warm(|times| times.min_ms),
            row.end_ratio
                .map_or("-".into(), |ratio| format!("{ratio:.2}")),
            median(&row.warm_first_output),
            median(&row.cold_end),
            format!("{:.0}", row.prepare_ms),
            mib(row.peak_kib << 10),
            mib(row.image_bytes + row.kernel_bytes),
            row.kernel_seen.clone().unwrap_or_default(),
            format!("{:?}", row.statuses),
        ] {
            let _ = write!(html, "<td>{}</td>", escape(&cell));
        }
        *html += "</tr>\n";
    }
    *html += "</tbody></table></div>\n";
}

fn definitions(html: &mut String, title: &str, report: &Report, text: fn(&RowReport) -> String) {
    let _ = write!(html, "<h2>{title}</h2><dl>");
    for row in &report.rows {
        let (name, text) = (escape(&row.name), escape(&text(row)));
        let _ = write!(html, "<dt>{name}</dt><dd>{text}</dd>");
    }
    *html += "</dl>\n";
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
