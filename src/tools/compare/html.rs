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
    let mut html = String::new();
    let command = escape(&report.command.join(" "));
    let _ = write!(
        html,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>minivmm compare: {command}</title><style>{STYLE}</style></head><body><main>\n\
         <h1>One command, in containers and in a virtual machine</h1>\n<p class=\"lead\"><code>{command}</code> on {}</p>\n<p>{}</p>\n",
        escape(&report.rootfs),
        headline(report),
    );
    for kind in 0..RowReport::TIMES {
        let mut title = "";
        let mut rows = Vec::new();
        for row in &report.rows {
            let (name, times, _) = row.times(kind);
            title = name;
            rows.extend(times.map(|times| (row, times)));
        }
        if !rows.is_empty() {
            strips(&mut html, title, &rows);
        }
    }
    let good: Vec<&RowReport> = report
        .rows
        .iter()
        .filter(|row| row.error.is_none())
        .collect();
    bars(
        &mut html,
        "private memory of a run at most, and (lighter) of daemons that serve all runs",
        &good,
        |row| vec![row.peak_kib << 10, row.daemons_kib << 10],
    );
    bars(
        &mut html,
        "what is shipped: image, (lighter) kernel, (lightest) programs that the host must have",
        &good,
        |row| vec![row.image_bytes, row.kernel_bytes, row.programs_bytes],
    );
    table(&mut html, report);
    list(
        &mut html,
        "What it shares with the host",
        report,
        |row| match &row.error {
            Some(error) => format!("failed: {error}"),
            None => row.sharing(),
        },
    );
    list(&mut html, "Commands", report, |row| {
        format!(
            "{}; programs: {} ({})",
            row.command,
            row.programs.join(", "),
            row.version
        )
    });
    let cold = format!("Cold: {}.", report.cold);
    paragraphs(
        &mut html,
        "How it was measured",
        METHOD.iter().copied().chain([&*cold]),
    );
    paragraphs(&mut html, "What it does not show", LIMITS.iter().copied());
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
    let median = |row: &RowReport| row.warm_end.as_ref().map(|times| times.median_ms);
    let vm = report.rows.iter().find(|row| row.is_vm);
    let vm = vm.and_then(|row| Some((median(row)?, row.end_ratio?)));
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

/// A dot for each run, a stroke for the median.
fn strips(html: &mut String, title: &str, rows: &[(&RowReport, &Summary)]) {
    let max = rows
        .iter()
        .map(|(_, times)| times.max_ms)
        .fold(0.0, f64::max);
    let scale = open_plot(html, title, rows.len(), max, "ms");
    for (i, (row, times)) in rows.iter().enumerate() {
        let y = label(html, i, row);
        for ms in &times.samples_ms {
            let x = scale(*ms);
            let _ = write!(
                html,
                "<circle class=\"run\" cx=\"{x:.1}\" cy=\"{y}\" r=\"4\"/>"
            );
        }
        let (x, top, bottom) = (scale(times.median_ms), y - 11.0, y + 11.0);
        let _ = write!(
            html,
            "<line class=\"median\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>\
             <text x=\"{:.1}\" y=\"{}\">{:.1} ms</text></g>",
            scale(times.max_ms) + 10.0,
            y + 4.0,
            times.median_ms
        );
    }
    html.push_str("</svg></figure>\n");
}

/// Bars of bytes, in parts one behind another.
fn bars(html: &mut String, title: &str, rows: &[&RowReport], parts: fn(&RowReport) -> Vec<u64>) {
    const MIB: f64 = (1 << 20) as f64;
    let sum = |row: &RowReport| parts(row).iter().sum::<u64>();
    let max = rows.iter().map(|row| sum(row)).max().unwrap_or_default() as f64 / MIB;
    let scale = open_plot(html, title, rows.len(), max, "MiB");
    for (i, row) in rows.iter().enumerate() {
        let y = label(html, i, row);
        let mut before = 0.0;
        for (part, bytes) in parts(row).into_iter().enumerate() {
            let value = bytes as f64 / MIB;
            let (x, end) = (scale(before), scale(before + value));
            before += value;
            let _ = write!(
                html,
                "<rect class=\"part{part}\" x=\"{x:.1}\" y=\"{}\" width=\"{:.1}\" height=\"18\"><title>{}</title></rect>",
                y - 9.0,
                end - x,
                mib(bytes)
            );
        }
        let shown: Vec<String> = parts(row)
            .into_iter()
            .filter(|bytes| *bytes > 0)
            .map(number)
            .collect();
        let _ = write!(
            html,
            "<text x=\"{:.1}\" y=\"{}\">{} MiB</text></g>",
            scale(before) + 10.0,
            y + 4.0,
            shown.join(" + ")
        );
    }
    html.push_str("</svg></figure>\n");
}

fn number(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / f64::from(1 << 20))
}

/// A runtime's name; returns the middle of its row, whose group stays open.
fn label(html: &mut String, row_number: usize, row: &RowReport) -> f64 {
    let y = ROW * (row_number as f64 + 0.5);
    let class = if row.is_vm { "vm" } else { "container" };
    let name = escape(&row.name);
    let _ = write!(
        html,
        "<g class=\"{class}\"><text class=\"name\" x=\"{}\" y=\"{}\">{name}</text>",
        LEFT - 10.0,
        y + 4.0
    );
    y
}

/// Begins a plot with an axis from 0 to `max`; returns where on it a value lies.
fn open_plot(
    html: &mut String,
    title: &str,
    rows: usize,
    max: f64,
    unit: &str,
) -> impl Fn(f64) -> f64 + use<> {
    let max = if max > 0.0 { max } else { 1.0 };
    let scale = move |value: f64| LEFT + value / max * (WIDTH - LEFT - RIGHT);
    let bottom = ROW * rows as f64;
    let title = escape(title);
    let _ = write!(
        html,
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
    scale
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
    let median = |times: &Option<Summary>| match times {
        Some(times) => format!("{:.1}", times.median_ms),
        None => "-".into(),
    };
    for row in &report.rows {
        let _ = write!(html, "<tr><th>{}</th>", escape(&row.name));
        if row.error.is_some() {
            html.push_str("<td colspan=\"12\" class=\"error\">failed, see below</td></tr>\n");
            continue;
        }
        let warm = row.warm_end.as_ref();
        let warm = warm.map_or([None; 4], |w| {
            [w.median_ms, w.p90_ms, w.p99_ms, w.min_ms].map(Some)
        });
        for ms in warm {
            let _ = write!(
                html,
                "<td>{}</td>",
                ms.map_or("-".into(), |ms| format!("{ms:.1}"))
            );
        }
        for cell in [
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
        html.push_str("</tr>\n");
    }
    html.push_str("</tbody></table></div>\n");
}

fn list(html: &mut String, title: &str, report: &Report, text: fn(&RowReport) -> String) {
    let _ = write!(html, "<h2>{title}</h2><dl>");
    for row in &report.rows {
        let _ = write!(
            html,
            "<dt>{}</dt><dd>{}</dd>",
            escape(&row.name),
            escape(&text(row))
        );
    }
    html.push_str("</dl>\n");
}

fn paragraphs<'a>(html: &mut String, title: &str, texts: impl Iterator<Item = &'a str>) {
    let _ = write!(html, "<h2>{title}</h2><ul>");
    for text in texts {
        let _ = write!(html, "<li>{}</li>", escape(text));
    }
    html.push_str("</ul>\n");
}

/// Text as it may stand anywhere in HTML.
fn escape(text: &str) -> String {
    text.chars().fold(String::new(), |mut html, c| {
        match c {
            '&' => html.push_str("&amp;"),
            '<' => html.push_str("&lt;"),
            '>' => html.push_str("&gt;"),
            '"' => html.push_str("&quot;"),
            '\'' => html.push_str("&#39;"),
            _ => html.push(c),
        }
        html
    })
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
