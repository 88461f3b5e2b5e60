#include "pool/pool.h"

#include <gtest/gtest.h>

namespace sp {
namespace {

SessionKey Session(uint8_t n, uint32_t uid = 1000) {
  SessionKey key{{}, uid, uint32_t{100} + n, 7};
  key.session.bytes.fill(n);
  return key;
}

Pool WithExtents(uint32_t count, uint32_t max) {
  Pool pool(8192, max);
  for (uint32_t id = 1; id <= count; ++id) pool.AddExtent(id);
  return pool;
}

using Ids = std::vector<uint32_t>;

TEST(Plan, TakesFreeExtentsThenCreatesThenRefuses) {  // I-27
  Pool pool = WithExtents(2, 3);
  EXPECT_EQ(pool.PlanSlot(Session(1), 2, {})->ready, (Ids{1, 2}));
  auto three = pool.PlanSlot(Session(1), 3, {});
  EXPECT_EQ(three->ready, (Ids{1, 2}));
  EXPECT_EQ(three->create, 1u);
  auto four = pool.PlanSlot(Session(1), 4, {});
  ASSERT_FALSE(four.has_value());
  EXPECT_EQ(four.error().code(), StatusCode::kNoSpace);
}

TEST(Plan, ExtentsOfTheSameIdentityAreReusedAsTheyAre) {
  Pool pool = WithExtents(1, 1);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  pool.RemoveSlot(1);
  EXPECT_FALSE(pool.PlanSlot(Session(2), 1, {}).has_value());  // I-10: its writer is not known dead.
  EXPECT_EQ(pool.PlanSlot(Session(1), 1, {})->ready, Ids{1});
  pool.Forget(Session(1).session);
  EXPECT_EQ(pool.PlanSlot(Session(2), 1, {})->ready, Ids{1});
}

TEST(Plan, AnExtentIsNeverLentUnderTwoIdentities) {  // I-10, I-38: a child of the dead may have its mapping, or a stranger its descriptor
  Pool pool = WithExtents(2, 2);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  pool.RemoveSlot(1);
  pool.Forget(Session(1).session);
  EXPECT_EQ(pool.NeverLent(), Ids{2});
  auto plan = pool.PlanSlot(Session(2, 1001), 2, {});
  EXPECT_EQ(plan->ready, Ids{2});
  EXPECT_EQ(plan->replace, Ids{1});
  EXPECT_EQ(plan->create, 1u);
  EXPECT_EQ(pool.PlanSlot(Session(4), 2, {})->ready, (Ids{1, 2}));
}

TEST(Plan, WhatAKnownProcessHoldsIsNotReplaced) {  // I-27: its memory would not be freed
  Pool pool = WithExtents(1, 1);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  pool.Lend({1}, Session(3).session);  // A reader of the first identity.
  pool.RemoveSlot(1);
  EXPECT_FALSE(pool.PlanSlot(Session(2, 1001), 1, {}).has_value());
  pool.Forget(Session(1).session);
  EXPECT_FALSE(pool.PlanSlot(Session(2, 1001), 1, {}).has_value());
  pool.Forget(Session(3).session);
  EXPECT_EQ(pool.PlanSlot(Session(2, 1001), 1, {})->replace, Ids{1});
}

TEST(Plan, ExtentsAreReplacedOnlyWhereTheirRoomIsNeeded) {
  Pool pool = WithExtents(1, 2);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  pool.RemoveSlot(1);
  pool.Forget(Session(1).session);
  EXPECT_TRUE(pool.PlanSlot(Session(2, 1001), 1, {})->replace.empty());
  EXPECT_EQ(pool.PlanSlot(Session(2, 1001), 2, {})->replace, Ids{1});
}

TEST(Plan, SmallIdleSlotsOfTheSameSessionAreDissolvedFirst) {
  Pool pool = WithExtents(3, 3);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  ASSERT_TRUE(pool.AddSlot({2, Session(2), {2}}));
  auto plan = pool.PlanSlot(Session(1), 2, {});
  EXPECT_EQ(plan->dissolve, std::vector<uint64_t>{1});
  EXPECT_EQ(plan->ready, Ids{3});
  pool.SetSlotState(1, SlotState::kSealed);
  EXPECT_FALSE(pool.PlanSlot(Session(1), 2, {}).has_value());  // I-14: never what is sealed.
}

TEST(Plan, IdleSlotsOfEndedSessionsOfTheSameProcessAreDissolved) {  // I-10
  Pool pool = WithExtents(3, 3);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1, 2}}));
  SessionKey same = Session(1);
  same.session = Session(9).session;
  EXPECT_FALSE(pool.PlanSlot(same, 3, {}).has_value());
  EXPECT_EQ(pool.PlanSlot(same, 3, {Session(1).session})->dissolve, std::vector<uint64_t>{1});
  EXPECT_EQ(pool.PlanSlot(same, 2, {Session(1).session})->dissolve, std::vector<uint64_t>{1});
  EXPECT_FALSE(pool.PlanSlot(Session(2), 3, {Session(1).session}).has_value());
  pool.SetSlotState(1, SlotState::kZombie);
  EXPECT_FALSE(pool.PlanSlot(same, 3, {Session(1).session}).has_value());
}

TEST(Plan, AFreeExtentIsItsLivingWritersProcesss) {  // I-10: a kill came between the end of its slot and the next one
  Pool pool = WithExtents(1, 1);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  pool.RemoveSlot(1);
  SessionKey same = Session(1);
  same.session = Session(9).session;
  EXPECT_EQ(pool.PlanSlot(same, 1, {})->ready, Ids{1});
  EXPECT_FALSE(pool.PlanSlot(Session(2), 1, {}).has_value());
}

TEST(Slots, OnlyIdleOnesOfTheSessionAreFoundTheSmallestFirst) {
  Pool pool = WithExtents(6, 6);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1, 2, 3}}));
  ASSERT_TRUE(pool.AddSlot({2, Session(1), {4, 5}}));
  EXPECT_EQ(pool.FindIdleSlot(Session(1).session, 1), 2u);
  EXPECT_EQ(pool.FindIdleSlot(Session(1).session, 3), 1u);
  EXPECT_EQ(pool.FindIdleSlot(Session(2).session, 1), std::nullopt);
  for (SlotState state : {SlotState::kPending, SlotState::kLeased, SlotState::kSealed, SlotState::kZombie}) {
    pool.SetSlotState(2, state);
    EXPECT_EQ(pool.FindIdleSlot(Session(1).session, 1), 1u);
  }
}

TEST(Slots, AreAdoptedFromEndedSessionsOfTheSameProcessOnly) {  // I-10
  Pool pool = WithExtents(1, 1);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  SessionKey same = Session(1);
  same.session = Session(9).session;
  EXPECT_EQ(pool.FindAdoptableSlot(same, 1, {}), std::nullopt);
  EXPECT_EQ(pool.FindAdoptableSlot(same, 1, {Session(1).session}), 1u);
  EXPECT_EQ(pool.FindAdoptableSlot(same, 2, {Session(1).session}), std::nullopt);
  SessionKey other = same;
  other.start_time = 8;  // The pid was reused.
  EXPECT_EQ(pool.FindAdoptableSlot(other, 1, {Session(1).session}), std::nullopt);
  other = same;
  other.uid = 1001;
  EXPECT_EQ(pool.FindAdoptableSlot(other, 1, {Session(1).session}), std::nullopt);
  pool.TransferLent(Session(1).session, same.session);
  EXPECT_TRUE(pool.HoldsLent(same.session));
  EXPECT_FALSE(pool.HoldsLent(Session(1).session));
}

TEST(Slots, AnExtentIsInOneSlotOnly) {  // I-10
  Pool pool = WithExtents(2, 2);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  EXPECT_FALSE(pool.AddSlot({1, Session(1), {2}}));
  EXPECT_FALSE(pool.AddSlot({2, Session(1), {1}}));
  EXPECT_FALSE(pool.AddSlot({2, Session(1), {2, 2}}));
  EXPECT_FALSE(pool.AddSlot({2, Session(1), {2, 7}}));
  EXPECT_EQ(pool.SlotsWith({1, 2}), std::vector<uint64_t>{1});
  EXPECT_TRUE(pool.CheckInvariants().ok());
  EXPECT_EQ(pool.totals().idle, 1u);
  EXPECT_EQ(pool.totals().free, 1u);
}

TEST(Slots, AnUnwatchableWritersFreeExtentsLeaveThePool) {  // I-10
  Pool pool = WithExtents(3, 3);
  ASSERT_TRUE(pool.AddSlot({1, Session(1), {1}}));
  ASSERT_TRUE(pool.AddSlot({2, Session(1), {2}}));
  pool.Lend({3}, Session(1).session);  // As a reader.
  pool.RemoveSlot(1);
  EXPECT_EQ(pool.Abandon(Session(1).session), Ids{1});
  EXPECT_EQ(pool.FindExtent(1), nullptr);
  EXPECT_NE(pool.FindExtent(2), nullptr);
  EXPECT_TRUE(pool.FindExtent(3)->lent_to.empty());
}

TEST(Extents, OfASlotThatCannotBeAdoptedStayTheWriters) {
  Pool pool = WithExtents(1, 3);
  pool.MarkLent({1, Session(1), {1, 5}});
  EXPECT_EQ(pool.FindExtent(1)->uid, 1000u);
  EXPECT_TRUE(pool.NeverLent().empty());
  EXPECT_TRUE(pool.PlanSlot(Session(2), 1, {})->ready.empty());
}

TEST(Totals, CountEveryState) {
  Pool pool = WithExtents(7, 8);
  pool.BeginCreate(8);
  pool.SetPending(6);
  const SlotState states[] = {SlotState::kIdle, SlotState::kPending, SlotState::kLeased, SlotState::kSealed, SlotState::kZombie};
  for (uint32_t i = 0; i < 5; ++i) {
    ASSERT_TRUE(pool.AddSlot({i + 1, Session(1), {i + 1}}));
    pool.SetSlotState(i + 1, states[i]);
  }
  const Pool::Totals t = pool.totals();
  EXPECT_EQ(t.extents, 8u);
  EXPECT_EQ(t.creating, 1u);
  EXPECT_EQ(t.pending, 2u);
  EXPECT_EQ(t.idle, 1u);
  EXPECT_EQ(t.leased, 1u);
  EXPECT_EQ(t.sealed, 1u);
  EXPECT_EQ(t.zombie, 1u);
  EXPECT_EQ(t.free, 1u);
  EXPECT_TRUE(pool.CheckInvariants().ok());
}

}  // namespace
}  // namespace sp
