/* The lease of botlease in Promela, written apart from Lease.tla: processes instead of one relation, requests in slots
 * instead of sets, and a clock that every timer counts down with. One switch per rule: -DNO_R1 ... -DNO_R8 takes it away.
 *
 *   spin -a -DNO_R3 lease.pml && gcc -O2 -DSAFETY -DNOCLAIM -DCOLLAPSE -o pan pan.c && ./pan -m1000000 -w28
 *
 * A supervisor asks the database and waits; the answer carries nothing that it did not ask for. The kernel ends a work
 * whose fence has run down. Faults are counted: FAULTS of them, at any moment.
 */
#ifndef N
#define N 2
#endif
#ifndef FAULTS
#define FAULTS 1
#endif
#ifndef TERMS
#define TERMS 2
#endif

#define TTL 4
#define TRUST 2      /* ttl*(1-rho) - kill budget: 4 - 1 - 1 */
#define PATIENCE 5   /* ttl*(1+rho) */
#define DELAY 2      /* lock-delay */
#define UNKNOWN 9

mtype = { standby, holding, working, draining, reaping, dead };
mtype = { nothing, acquire, renew, release };
mtype = { released, expired, died, unread };

/* The database: the row, what it was before the last acquire, and the timeline it is on. */
byte term, holder, line_of_row, era;
byte old_term, old_holder, old_line;
bit gone_row, by_expiry, old_by_expiry;
byte assigned;

typedef Instance {
  mtype phase;
  mtype question;      /* what is asked, and not answered or given up */
  mtype evidence;
  byte age;            /* of the question */
  byte mine, origin;   /* the term that is held, and the timeline it was granted on */
  byte trust, wait;    /* ticks that are left of it; ticks until the work may start, or the release be written */
  byte watched;        /* ticks for which the row has not changed, as far as we saw */
  byte seen_term, seen_holder, seen_line;
  bit fresh, doubt, paused, stopped;
  /* one request under way: it may be carried out long after it was given up */
  mtype request;
  byte r_term, r_holder, r_line, r_mine;
  bit r_fresh, r_live;
  mtype r_evidence;
  /* its answer */
  bit answered, ok;
  byte a_term, a_line, a_wait;
  /* the work and its fence, which are the kernel's */
  bit runs;
  byte fence;
  bit over;            /* the fence has run down: one more tick is the kill budget */
};
Instance s[N + 1];

byte running, last, faults, flight_of, phase;
bit flight;

/* The switches. */
#ifdef NO_R1
#define FROM(i) TRUST
#define IN_TIME(i) 1
#else
#define FROM(i) (s[i].age < TRUST -> TRUST - s[i].age : 0)
#define IN_TIME(i) (s[i].trust > 0)
#endif
#ifdef NO_R3
#define BY_ITS_CLOCK(i) (s[i].seen_holder != 0)   /* the database's, which somebody has stepped */
#else
#define BY_ITS_CLOCK(i) 0
#endif
#ifdef NO_R4
#define AS_SEEN(i) 1
#else
#define AS_SEEN(i) (s[i].r_term == term && s[i].r_holder == holder && s[i].r_fresh && s[i].r_line == era)
#endif
/* A release leaves the term in the row: nobody, of the very term that was seen. */
#define RELEASED_SINCE(i) (holder == 0 && s[i].r_term == term && s[i].r_line == era)
#ifdef NO_R5
#define MAY_RELEASE(i) (s[i].phase == reaping || s[i].phase == draining)
#else
#define MAY_RELEASE(i) (s[i].phase == reaping)
#endif
#ifdef NO_R8
#define STOPPED(i) 0
#else
#define STOPPED(i) (s[i].stopped)
#endif
#ifdef NO_R2
#define LATE(i) (s[i].runs && s[i].over && !s[i].paused)
#else
#define LATE(i) (s[i].runs && s[i].over)
#endif
#define DEAD_HOLDER(i) (s[i].seen_holder <= N && s[i].seen_holder != 0 && s[s[i].seen_holder].phase == dead && !s[i].doubt)
#define STANDS(i) (AWAKE(i) && s[i].phase == standby && s[i].question == nothing)

#define AWAKE(i) (s[i].phase != dead && !s[i].paused)
#define SAME(i)  (s[i].seen_term == term && s[i].seen_holder == holder && s[i].fresh)

inline see(i) {
  s[i].doubt = 0;
#ifndef NO_R6
  s[i].doubt = (line_of_row != era || (s[i].watched != 99 && s[i].seen_line != era));
#endif
  s[i].seen_term = term; s[i].seen_holder = holder; s[i].seen_line = era; s[i].fresh = 1; s[i].watched = 0
}

inline back_to_standby(i) {
  s[i].phase = standby; s[i].mine = 0; s[i].trust = 0; s[i].wait = 0; s[i].origin = 0;
  s[i].watched = 99; s[i].fresh = 0; s[i].doubt = 0; s[i].seen_term = 0; s[i].seen_holder = 0; s[i].seen_line = 0
}

inline stop_asking(i) { s[i].question = nothing; s[i].age = 0; s[i].r_live = 0; s[i].answered = 0; s[i].ok = 0;
                        s[i].a_term = 0; s[i].a_line = 0; s[i].a_wait = 0; s[i].evidence = 0 }

inline end_work(i) { assert(s[i].runs); s[i].runs = 0; s[i].fence = 0; s[i].over = 0; running-- }

inline send(i, what) {
  s[i].question = what; s[i].age = 0;
  s[i].request = what; s[i].r_live = 1; s[i].r_mine = s[i].mine;
  s[i].r_term = s[i].seen_term; s[i].r_holder = s[i].seen_holder; s[i].r_line = s[i].seen_line; s[i].r_fresh = s[i].fresh;
  s[i].r_evidence = s[i].evidence
}

inline changed() {  /* the row was renewed or made anew: whoever saw it sees that it is not the same */
  j = 1;
  do
  :: j <= N ->
    if :: s[j].seen_term == term && s[j].seen_holder == holder -> s[j].fresh = 0 :: else fi;
    if :: s[j].r_term == term && s[j].r_holder == holder -> s[j].r_fresh = 0 :: else fi;
    j++
  :: else -> break
  od; j = 0
}

/* A supervisor. */
proctype supervisor(byte i) {
  byte j;
end:
  do
  /* standby: look, claim, take over, give back */
  :: atomic { STANDS(i) && !gone_row && (!SAME(i) || s[i].seen_line != era) -> see(i) }
  :: atomic { STANDS(i) && gone_row ->
      gone_row = 0;
#ifdef NO_R7
      holder = 0;
#else
      holder = UNKNOWN;
#endif
      changed() }
  :: atomic { STANDS(i) && !s[i].stopped && assigned < i ->
      assigned = i }
  :: atomic { STANDS(i) && assigned != 0 && assigned != i && s[assigned].phase == dead && !s[i].stopped -> assigned = i }
  :: atomic { (STANDS(i) && assigned == i && term < TERMS && s[i].watched != 99 && s[i].request == nothing &&
               s[i].seen_holder != i && !STOPPED(i) &&
               ((s[i].seen_holder == 0 && !s[i].doubt) || s[i].watched >= PATIENCE || BY_ITS_CLOCK(i) || DEAD_HOLDER(i))) ->
      if
      :: s[i].seen_holder == 0 && !s[i].doubt -> s[i].evidence = released
      :: else ->
        if
        :: DEAD_HOLDER(i) -> s[i].evidence = died
        :: else -> s[i].evidence = expired
        fi
      fi;
      send(i, acquire) }
  /* the release of a hold that was seen, taken without another look */
  :: atomic { (STANDS(i) && term < TERMS && s[i].watched < PATIENCE && s[i].request == nothing && !s[i].doubt &&
               s[i].seen_holder != 0 && s[i].seen_holder != i && s[i].seen_holder <= N && !DEAD_HOLDER(i) && !STOPPED(i)) ->
      s[i].evidence = unread; send(i, acquire) }
  :: atomic { STANDS(i) && !gone_row && holder == i && SAME(i) ->
      s[i].phase = reaping; s[i].mine = term; s[i].wait = DELAY }
  :: atomic { STANDS(i) && STOPPED(i) && holder != i -> back_to_standby(i); s[i].phase = dead }

  /* a hold: renew, start, drain, reap, release */
  :: atomic { (AWAKE(i) && (s[i].phase == holding || s[i].phase == working || s[i].phase == draining) &&
               s[i].question == nothing && s[i].request == nothing && s[i].trust > 0 && s[i].trust < TRUST) -> send(i, renew) }
  :: atomic { AWAKE(i) && s[i].phase == holding && (assigned != i || STOPPED(i) || s[i].trust == 0) -> s[i].phase = reaping }
  :: atomic { AWAKE(i) && s[i].phase == holding && s[i].wait == 0 && s[i].trust > 0 && assigned == i && !STOPPED(i) ->
      assert(running == 0);            /* at most one */
      assert(s[i].mine > last);        /* terms rise */
      assert(!flight);                 /* the lock-delay covers what a killed work had under way */
      assert(!s[i].stopped);           /* nothing begins after a stop signal */
      s[i].phase = working; s[i].runs = 1; s[i].fence = s[i].trust; s[i].over = 0; running++; last = s[i].mine }
  :: atomic { AWAKE(i) && s[i].phase == working && (assigned != i || s[i].stopped) -> s[i].phase = draining }
  :: atomic { s[i].phase == draining && s[i].runs -> end_work(i) }   /* it ends as it was asked to */
  :: atomic { AWAKE(i) && (s[i].phase == working || s[i].phase == draining) && !s[i].runs ->
      stop_asking(i); s[i].phase = reaping }
  :: atomic { AWAKE(i) && s[i].question == nothing && s[i].request == nothing && s[i].wait == 0 && MAY_RELEASE(i) -> send(i, release) }

  /* answers, or none */
  :: atomic { AWAKE(i) && s[i].answered ->
      if
      :: s[i].question == acquire && s[i].ok ->
        back_to_standby(i);
        s[i].mine = s[i].a_term; s[i].origin = s[i].a_line; s[i].wait = s[i].a_wait;
        s[i].trust = FROM(i);
        s[i].phase = (s[i].trust == 0 -> reaping : holding)
      :: s[i].question == renew && s[i].ok && s[i].a_line == s[i].origin ->
        if
        :: IN_TIME(i) ->
          s[i].trust = FROM(i);
          if :: s[i].runs -> s[i].fence = s[i].trust; s[i].over = (s[i].trust == 0) :: else fi
        :: else
        fi
      :: s[i].question == renew && (!s[i].ok || s[i].a_line != s[i].origin) ->
        s[i].trust = 0;
        if :: s[i].runs -> s[i].fence = 0; s[i].over = 1 :: else fi;
        s[i].phase = (s[i].phase == holding -> reaping : draining)
      :: s[i].question == release ->
        if :: !s[i].runs -> back_to_standby(i) :: else fi
      :: else
      fi;
      stop_asking(i) }
  :: atomic { AWAKE(i) && s[i].question != nothing && !s[i].answered && s[i].age > 0 ->
      stop_asking(i);
      if :: s[i].phase == reaping -> back_to_standby(i) :: else fi }
  od
}

/* Requests: carried out at any time, or lost. */
proctype database(byte i) {
  byte j;
end:
  do
  :: atomic { s[i].request == acquire ->
      if
      :: (!gone_row && assigned == i && term < TERMS && s[i].phase != dead &&
          (s[i].r_evidence == unread -> RELEASED_SINCE(i) : AS_SEEN(i))) ->
        if :: s[i].r_evidence == died && flight_of == term -> flight = 0 :: else fi;
        old_term = term; old_holder = holder; old_line = line_of_row; old_by_expiry = by_expiry;
        by_expiry = (s[i].r_evidence == expired || (s[i].r_evidence == died && by_expiry));
#ifdef NO_R6
        term = term + 1;
#else
        term = (line_of_row != era -> term + 1 + era : term + 1);
#endif
        holder = i; line_of_row = era;
        s[i].answered = s[i].r_live; s[i].ok = s[i].r_live;
        if :: s[i].r_live -> s[i].a_term = term; s[i].a_line = era; s[i].a_wait = (by_expiry -> DELAY : 0) :: else fi
      :: else -> s[i].answered = s[i].r_live; s[i].ok = 0
      fi;
      s[i].request = nothing; s[i].r_live = 0 }
  :: atomic { s[i].request == renew ->
      s[i].ok = (s[i].r_live && !gone_row && holder == i && term == s[i].r_mine);
      if :: !gone_row && holder == i && term == s[i].r_mine -> changed() :: else fi;
      s[i].answered = s[i].r_live; s[i].a_line = (s[i].r_live -> era : 0);
      s[i].request = nothing; s[i].r_live = 0 }
  :: atomic { s[i].request == release ->
      if
      :: !gone_row && holder == i && term == s[i].r_mine ->
        holder = 0;
        if :: flight_of == term -> flight = 0 :: else fi
      :: else
      fi;
      s[i].answered = s[i].r_live;
      s[i].request = nothing; s[i].r_live = 0 }
  :: atomic { s[i].request != nothing -> s[i].request = nothing; s[i].r_live = 0 }
  od
}

proctype kernel(byte i) {
end:
  do
  :: atomic { LATE(i) -> flight = 1; flight_of = s[i].mine; end_work(i) }
  od
}

inline count_down(i) {
  if
  :: s[i].phase != dead && !(i == 1 && phase == 3) ->   /* the first clock loses one tick in four */
    if :: s[i].question != nothing && s[i].age < TRUST -> s[i].age++ :: else fi;
    if :: s[i].trust > 0 -> s[i].trust-- :: else fi;
    if :: s[i].wait > 0 -> s[i].wait-- :: else fi;
    if :: s[i].watched < PATIENCE -> s[i].watched++ :: else fi
  :: else
  fi;
  if
  :: s[i].runs && !(i == 1 && phase == 3) ->
    if :: s[i].fence > 0 -> s[i].fence-- :: else fi;
    s[i].over = (s[i].fence == 0)
  :: else
  fi
}

/* What a supervisor that runs does at once. */
#define DUE(i) (AWAKE(i) && ( \
  (s[i].phase == standby && s[i].question == nothing && (gone_row || !SAME(i) || s[i].seen_line != era || holder == i)) || \
  (s[i].phase == holding && (assigned != i || s[i].stopped || s[i].wait == 0 || s[i].trust == 0)) || \
  (s[i].phase == working && (!s[i].runs || assigned != i || s[i].stopped)) || (s[i].phase == draining && !s[i].runs) || \
  (s[i].phase == reaping && s[i].question == nothing && s[i].request == nothing && s[i].wait == 0)))

proctype time() {
  byte i;
end:
  do
  :: atomic { (!DUE(1) && !LATE(1) && !DUE(2) && !LATE(2) && (N < 3 || (!DUE(N) && !LATE(N)))) ->
      flight = 0; flight_of = 0;
      i = 1;
      do :: i <= N -> count_down(i); i++ :: else -> break od;
      i = 0;
      phase = (phase + 1) % 4 }
  od
}

proctype trouble() {
  byte i, j;
end:
  do
  :: atomic { faults < FAULTS -> faults++;
      select(i : 1 .. N);
      if
      :: AWAKE(i) -> s[i].paused = 1
      :: s[i].phase != dead ->                          /* killed, and its work with it */
        if :: s[i].runs -> end_work(i) :: else fi;
        stop_asking(i); back_to_standby(i); s[i].phase = dead; s[i].paused = 0; s[i].stopped = 0
      :: AWAKE(i) && !s[i].stopped -> s[i].stopped = 1
      :: assigned != i -> assigned = i                  /* the operator */
      :: assigned != 0 -> assigned = 0
      :: !gone_row -> gone_row = 1
      :: era == 0 ->                                    /* the database comes back without its last acquire */
        era++; term = old_term; holder = old_holder; line_of_row = old_line; by_expiry = old_by_expiry
      fi;
      i = 0 }
  :: atomic { s[1].paused -> s[1].paused = 0 }
  :: atomic { s[2].paused -> s[2].paused = 0 }
#if N > 2
  :: atomic { s[3].paused -> s[3].paused = 0 }
#endif
  od
}

init {
  byte i = 1;
  atomic {
    do
    :: i <= N ->
      s[i].phase = standby; s[i].question = nothing; s[i].request = nothing; s[i].watched = 99;
      run supervisor(i); run database(i); run kernel(i);
      i++
    :: else -> break
    od;
    i = 0;
    run time(); run trouble()
  }
}
