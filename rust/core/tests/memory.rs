//! How much memory packing takes beside its input: a test of its own, since it counts what the whole process holds.

use dasd_lite_core::Interrupt;
use dasd_lite_core::pack::{Method, Options, Overlong, pack};
use dasd_lite_core::random::Random;
use peak_alloc::PeakAlloc;

#[global_allocator]
static ALLOCATOR: PeakAlloc = PeakAlloc;

#[test]
fn at_most_16_bytes_a_sequence_and_2_megabytes() {
    let mut random = Random::new(0);
    // Spread evenly, all different, all equal, and mostly short ones.
    let laws: [fn(&mut Random, usize) -> usize; 4] = [
        |random, _| 1 + random.below(65_536),
        |_, index| 1 + index * 48_271 % 65_536,
        |_, _| 500,
        |random, _| 1 + random.below(65_536) / (1 + random.below(1000)),
    ];
    for num in [1000, 65_536, 500_000] {
        for law in laws {
            let lengths: Vec<i32> = (0..num).map(|index| i32::try_from(law(&mut random, index)).unwrap()).collect();
            for method in [Method::BestFit, Method::Tight, Method::InOrder] {
                let options = Options { seq_len: 65_536, alignment: 1, method, overlong: Overlong::Error };
                let before = ALLOCATOR.current_usage();
                ALLOCATOR.reset_peak_usage();
                let plan = pack(&lengths, &options, &Interrupt::new()).unwrap();
                let taken = ALLOCATOR.peak_usage() - before;
                // What the plan itself holds is its result, not extra memory.
                let plan = 4 * plan.items.len() + 8 * plan.offsets.len();
                let extra = taken.saturating_sub(plan);
                println!("{num} {method:?}: {extra} bytes, {} a sequence", extra / num);
                assert!(extra <= 16 * num + (2 << 20), "{num} {method:?}: {extra} bytes");
            }
        }
    }
}
