//! Walking skeleton.
use std::path::Path; use std::time::{Duration,Instant};
fn main() -> Result<(), lab::error::Error> {
    let cache = Path::new("/work/lab-target/lab-cache");
    std::fs::create_dir_all(cache).ok();
    let k = lab::image::packages::kernel(cache, &std::env::args().nth(1).unwrap_or("6.12".into()), None, false)?;
    println!("{k:?}");
    let t = Instant::now();
    let image = lab::image::build(cache, &k, Path::new("/work/lab-target/release"), &Default::default())?;
    println!("image {:?} {:?}", image, t.elapsed());
    let t = Instant::now();
    let d = Path::new("/work/lab-target/x"); std::fs::create_dir_all(d).ok();
    let p = lab::qemu::Places{console:d.join("console"),log:d.join("log"),job:d.into(),target:"/work/lab-target/release".into()};
    let q = lab::qemu::Qemu::start("guest1", &image, lab::qemu::Machine{cpus:2,memory:1024}, &p, None)?;
    let l = lab::link::Link::new("guest1", q.agent)?;
    println!("ready {:?} {:?}", l.ready(Duration::from_secs(60))?, t.elapsed());
    let f = l.start(lab::proto::Program{argv:["bash","-c",&std::env::args().nth(2).unwrap_or("uname -a; cat /proc/modules".into())].iter().map(|s|s.to_string()).collect(),..Default::default()})?.wait(Duration::from_secs(60))?;
    println!("{}{}{:?} {:?}", f.out, f.err, f.ending, t.elapsed());
    Ok(())
}
