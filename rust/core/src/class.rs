//! The class of a sentence: which model finds it more probable.

/// Log-probabilities up to this far above 0 are rounding, not errors.
pub const TOLERANCE: f32 = 1e-4;

/// Number of classes that are counted: Shared, Teacher, Student.
pub const NUM_CLASSES: usize = 3;

/// Class of a sentence by the probabilities of teacher and student; columns hold the discriminant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i8)]
pub enum SentenceClass {
    /// One of the models has no token in it.
    None = -1,
    /// The probabilities differ by at most β.
    Shared = 0,
    /// The teacher's is higher by more than β.
    Teacher = 1,
    /// The student's is higher by more than β.
    Student = 2,
}

#[inline(always)]
#[expect(clippy::inline_always, reason = "part of the kernel")]
pub(crate) fn class_of(p_teacher: f32, p_student: f32, beta: f64) -> i8 {
    let difference = f64::from(p_teacher) - f64::from(p_student);
    if difference > beta {
        SentenceClass::Teacher as i8
    } else if -difference > beta {
        SentenceClass::Student as i8
    } else if difference.is_nan() {
        SentenceClass::None as i8
    } else {
        SentenceClass::Shared as i8
    }
}
