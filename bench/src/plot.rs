//! Grouped bar charts and line charts, as SVG and PNG.
//!
//! The PNG needs no fonts of the system: its text is drawn from a built-in 8 by 8 bitmap font.

use std::path::Path;

use anyhow::anyhow;
use font8x8::legacy::BASIC_LEGACY;
use plotters::prelude::*;
use plotters_backend::{BackendColor, BackendStyle, BackendTextStyle, DrawingErrorKind};

/// What to draw: `groups` along the x axis, in each one value per series.
pub struct Chart {
    /// Above the chart.
    pub title: String,
    /// Beside the y axis.
    pub unit: String,
    /// Along the x axis.
    pub groups: Vec<String>,
    /// Name and one value per group.
    pub series: Vec<(String, Vec<f64>)>,
    /// Logarithmic y axis.
    pub log: bool,
}

const SIZE: (u32, u32) = (1100, 560);
const COLORS: [RGBColor; 6] = [
    RGBColor(120, 120, 120),
    RGBColor(178, 205, 232),
    RGBColor(66, 133, 196),
    RGBColor(250, 190, 120),
    RGBColor(217, 95, 2),
    RGBColor(27, 158, 119),
];

impl Chart {
    /// Writes `stem.svg` and `stem.png`.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn write(&self, stem: &Path) -> anyhow::Result<()> {
        let path = stem.with_extension("svg");
        let svg = SVGBackend::new(&path, SIZE).into_drawing_area();
        self.draw(&svg)
            .map_err(|e| anyhow!("{}.svg: {e}", stem.display()))?;
        let path = stem.with_extension("png");
        let png = Bitmap(BitMapBackend::new(&path, SIZE)).into_drawing_area();
        self.draw(&png)
            .map_err(|e| anyhow!("{}.png: {e}", stem.display()))
    }

    fn range(&self) -> (f64, f64) {
        let values = || {
            self.series
                .iter()
                .flat_map(|(_, v)| v)
                .copied()
                .filter(|v| *v > 0.0 && v.is_finite())
        };
        let max = values().fold(0.0, f64::max).max(1e-3);
        let min = values().fold(max, f64::min);
        if self.log {
            (
                10f64.powf(min.log10().floor() - 0.2),
                10f64.powf(max.log10() + 0.9),
            )
        } else {
            (0.0, max * 1.35)
        }
    }

    fn draw<D: DrawingBackend>(&self, root: &DrawingArea<D, plotters::coord::Shift>) -> Result<(), String> {
        let s = |e: DrawingAreaErrorKind<D::ErrorType>| e.to_string();
        root.fill(&WHITE).map_err(s)?;
        let (low, high) = self.range();
        let groups = self.groups.len().max(1) as f64;
        // The scale is applied here, so that both kinds share the code below.
        let scale = |v: f64| if self.log { v.max(low).log10() } else { v };
        let mut chart = ChartBuilder::on(root)
            .caption(&self.title, ("sans-serif", 20))
            .margin(14)
            .x_label_area_size(46)
            .y_label_area_size(84)
            .build_cartesian_2d(0.0..groups, scale(low)..scale(high))
            .map_err(s)?;
        let ticks = |v: &f64| crate::stats::sig(if self.log { 10f64.powf(*v) } else { *v });
        chart
            .configure_mesh()
            .disable_x_mesh()
            .disable_x_axis()
            .y_desc(&self.unit)
            .y_label_formatter(&ticks)
            .label_style(("sans-serif", 13))
            .light_line_style(WHITE)
            .draw()
            .map_err(s)?;
        let slot = 0.84 / self.series.len().max(1) as f64;
        for (n, (name, values)) in self.series.iter().enumerate() {
            let color = COLORS[n % COLORS.len()];
            let bars = values
                .iter()
                .enumerate()
                .filter(|(_, v)| **v > 0.0)
                .map(|(g, v)| {
                    let x = g as f64 + 0.08 + n as f64 * slot;
                    Rectangle::new([(x, scale(low)), (x + slot * 0.92, scale(*v))], color.filled())
                });
            chart
                .draw_series(bars)
                .map_err(s)?
                .label(format!("{name}  "))
                .legend(move |(x, y)| Rectangle::new([(x, y - 5), (x + 12, y + 5)], color.filled()));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK.mix(0.3))
            .label_font(("sans-serif", 13))
            .draw()
            .map_err(s)?;
        let plot = chart.plotting_area();
        for (g, name) in self.groups.iter().enumerate() {
            let (x, y) = plot.map_coordinate(&(g as f64 + 0.5, scale(low)));
            let style =
                TextStyle::from(("sans-serif", 13).into_font()).pos(plotters::style::text_anchor::Pos::new(
                    plotters::style::text_anchor::HPos::Center,
                    plotters::style::text_anchor::VPos::Top,
                ));
            let (words, rest) = wrap(name, (900 / self.groups.len().max(1)) / 8);
            root.draw_text(&words, &style, (x, y + 6)).map_err(s)?;
            if !rest.is_empty() {
                root.draw_text(&rest, &style, (x, y + 22)).map_err(s)?;
            }
        }
        root.present().map_err(s)
    }
}

/// Splits a label into two lines at a space, so that the first has at most `width` characters.
fn wrap(label: &str, width: usize) -> (String, String) {
    if label.chars().count() <= width {
        return (label.to_owned(), String::new());
    }
    let cut = label
        .char_indices()
        .filter(|(i, c)| *c == ' ' && label[..*i].chars().count() <= width)
        .map(|(i, _)| i)
        .next_back();
    match cut {
        Some(at) => (label[..at].to_owned(), label[at + 1..].to_owned()),
        None => (label.to_owned(), String::new()),
    }
}

/// The bitmap backend with text of its own.
struct Bitmap<'a>(BitMapBackend<'a>);

fn glyph_scale(size: f64) -> i32 {
    if size >= 18.0 { 2 } else { 1 }
}

impl DrawingBackend for Bitmap<'_> {
    type ErrorType = <BitMapBackend<'static> as DrawingBackend>::ErrorType;

    fn get_size(&self) -> (u32, u32) {
        self.0.get_size()
    }
    fn ensure_prepared(&mut self) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        self.0.ensure_prepared()
    }
    fn present(&mut self) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        self.0.present()
    }
    fn draw_pixel(
        &mut self,
        at: (i32, i32),
        color: BackendColor,
    ) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        self.0.draw_pixel(at, color)
    }
    fn draw_rect<S: BackendStyle>(
        &mut self,
        from: (i32, i32),
        to: (i32, i32),
        style: &S,
        fill: bool,
    ) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        self.0.draw_rect(from, to, style, fill)
    }
    fn estimate_text_size<T: BackendTextStyle>(
        &self,
        text: &str,
        style: &T,
    ) -> Result<(u32, u32), DrawingErrorKind<Self::ErrorType>> {
        let cell = glyph_scale(style.size()).unsigned_abs() * 8;
        Ok((text.chars().count() as u32 * cell, cell))
    }
    fn draw_text<T: BackendTextStyle>(
        &mut self,
        text: &str,
        style: &T,
        at: (i32, i32),
    ) -> Result<(), DrawingErrorKind<Self::ErrorType>> {
        use plotters_backend::FontTransform;
        use plotters_backend::text_anchor::{HPos, VPos};
        let scale = glyph_scale(style.size());
        let cell = 8 * scale;
        let length = text.chars().count() as i32 * cell;
        let x0 = match style.anchor().h_pos {
            HPos::Left => 0,
            HPos::Center => -length / 2,
            HPos::Right => -length,
        };
        let y0 = match style.anchor().v_pos {
            VPos::Top => 0,
            VPos::Center => -cell / 2,
            VPos::Bottom => -cell,
        };
        let turned = !matches!(style.transform(), FontTransform::None);
        let (width, height) = self.get_size();
        for (n, c) in text.chars().enumerate() {
            let glyph = BASIC_LEGACY
                .get(c as usize)
                .copied()
                .unwrap_or(BASIC_LEGACY[usize::from(b'?')]);
            for bit in 0..64 * scale * scale {
                let (row, col) = (bit / cell, bit % cell);
                if glyph[(row / scale) as usize] >> (col / scale) & 1 == 0 {
                    continue;
                }
                let (dx, dy) = (x0 + n as i32 * cell + col, y0 + row);
                // Upwards along the y axis.
                let (x, y) = if turned {
                    (at.0 + dy, at.1 - dx)
                } else {
                    (at.0 + dx, at.1 + dy)
                };
                if x >= 0 && y >= 0 && x < width as i32 && y < height as i32 {
                    self.0.draw_pixel((x, y), style.color())?;
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_wrap_at_spaces() {
        assert_eq!(wrap("short", 8), ("short".into(), String::new()));
        assert_eq!(
            wrap("4 KiB cached read", 8),
            ("4 KiB".into(), "cached read".into())
        );
        assert_eq!(wrap("unbreakable", 4), ("unbreakable".into(), String::new()));
    }

    #[test]
    fn files_are_written() {
        let dir = tempfile::tempdir().unwrap();
        for log in [false, true] {
            let chart = Chart {
                title: "title".into(),
                unit: "us".into(),
                groups: vec!["a".into(), "b".into()],
                series: vec![("one".into(), vec![1.0, 200.0]), ("two".into(), vec![0.0, 30.0])],
                log,
            };
            chart.write(&dir.path().join("chart")).unwrap();
            let png = std::fs::read(dir.path().join("chart.png")).unwrap();
            assert!(png.starts_with(b"\x89PNG"));
            let svg = std::fs::read_to_string(dir.path().join("chart.svg")).unwrap();
            assert!(svg.contains("<svg") && svg.contains("title"));
        }
    }
}
